#!/bin/sh
# Removes from a virtual environment what the job never loads. Each entry is here for its size; a test runs the job
# on what is left.
set -eu
cd "$1"/lib/python3.*/site-packages

# The libraries' own tests; torch's, and its programs, are compiled ones. torch_shm_manager is for tensors in files.
find . -type d \( -name tests -o -path ./torch/test \) -prune -exec rm -rf {} +
find ./torch/bin -type f ! -name torch_shm_manager -delete

# Static libraries, and headers that nothing is compiled against; DeepSpeed compiles against torch's.
find . -name '*.a' -delete
rm -rf pyarrow/include

# Arrow's RPC and its own S3 client; pyarrow imports neither unless asked.
rm -f pyarrow/libarrow_flight* pyarrow/libarrow_python_flight* pyarrow/_flight* pyarrow/libarrow_s3* pyarrow/_s3fs*

# bitsandbytes brings a library for each CUDA, ROCm and XPU there is, and loads the one for torch's: `cuda130` is 13.0.
cuda=$("$1/bin/python" -c 'import torch; print((torch.version.cuda or "").replace(".", ""))')
find bitsandbytes -name 'libbitsandbytes_*.so' ! -name 'libbitsandbytes_cpu.so' ! -name "libbitsandbytes_cuda${cuda}.so" \
  -delete

# Of CUDA, what no library is linked to, and no code of ours asks for by name: the solver for several GPUs, a second
# NVRTC, counters for profilers (with Triton's own profiler), and NVSHMEM's code for kernels. cuDNN's engines stay:
# attention and convolutions choose among them on the GPU.
rm -f nvidia/cu*/lib/libcusolverMg.so* nvidia/cu*/lib/libnvrtc*.alt.so* nvidia/cu*/lib/libnvperf_*.so* \
  nvidia/nvshmem/lib/libnvshmem_device.bc triton/_C/libproton.so
rm -rf triton/backends/nvidia/lib/cupti
