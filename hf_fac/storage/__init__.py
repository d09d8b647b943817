"""What is on disk is whole or not there, and is not computed twice. Needs no torch."""
