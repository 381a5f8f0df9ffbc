"""The web page: a shell around the same records as the command line. It answers on this machine only, and only reads.

state    what the address says, and nothing else: names from tables, numbers in ranges
answers  state → records, by calling the lower floors; no arithmetic of its own
pages    records → what the templates show
server   who may ask what: hosts, methods, headers, a limit of time
serve    a port, and the process
"""
