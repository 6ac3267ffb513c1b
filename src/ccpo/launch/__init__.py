"""How a run is started on several processes: ``--launch torchrun:8``, ``--launch ray``."""
