"""The reference trainer: the real loop with the books kept. Read in this order, one sitting:

config      what may stand in the TOML file             step    one optimizer update, on real or fake tensors
checkpoint  saved whole or not at all                   log     losses written down, lost ones told
loop        all of it together

Beside it: `bursar.ranks` the processes, `bursar.files` what is whole on disk, `bursar.meter` a step forecast and
measured, `bursar.workload.samples` the data.
"""
