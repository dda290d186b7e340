"""The app, and the console command: reads ``sim`` and ``cuda_kernels``, computes nothing itself."""
