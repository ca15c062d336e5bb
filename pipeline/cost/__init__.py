"""What work costs: counted FLOPs by method and backbone, and the GPU-hours that follow at a stated utilisation."""
