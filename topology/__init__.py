"""Hosts, processors and links as plain values.

values       what a host, an interface, a port, a path and a measurement are
parsers_*    captured text or a folder of files -> values; pure, and never surprised by a new format
collect      runs the commands and calls the parsers: this host
advice       what is wrong with a host's cabling or settings
routes       which paths lead to another host, and which is best by measurement
pin, measure keep a connection on its path, and time it
"""
