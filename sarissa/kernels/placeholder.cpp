namespace sarissa::kernels {}
