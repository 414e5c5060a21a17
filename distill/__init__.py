"""The objective, the Distiller, the stages, metrics, config, command line and report."""
