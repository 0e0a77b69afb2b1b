"""Libraries whose models bayesprune names, rebuilds and trains; one file each, imported only where it is installed."""
