"""`longhaul verify --topologies`: the trainer's steps on many topologies are those of one process.

Every case is a real run of the trainer on a tiny model: which model, on which mesh, under which way to hold less, schedule,
engines and recomputation (`cases`). What one process makes of the same model and streams is the reference (`job`).
"""
