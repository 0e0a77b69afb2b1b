"""The page of the measurements at scale, made from the results file alone."""


def page(runs, settings):
    return ""
