"""Certificates: which predictions no small change of the input can turn."""

from bayesprune.certification.certify import Certificate, certify

__all__ = ["Certificate", "certify"]
