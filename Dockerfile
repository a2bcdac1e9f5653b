# feddra-ds in a container, for CPUs and NVIDIA GPUs:
#   docker build -t feddra-ds .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/work" --user "$(id -u):$(id -g)" feddra-ds train --config cxr_regions --data.root data/mine
# On the package index torch is the CUDA build, some 3 GB. For the CPU build give pip the index that has it, as
# docs/troubleshooting.md#torch-without-cuda says:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<that address> -t feddra-ds .
FROM python:3.12-slim

# DeepSpeed compiles its CPU kernels at their first use
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/feddra_ds
COPY constraints.txt .
RUN pip install -c constraints.txt torch setuptools wheel
COPY . .
RUN DS_BUILD_OPS=0 pip install -c constraints.txt .

# Not root; HOME is where compiled kernels and fetched models are kept, and may be written by any user that --user names
RUN useradd --create-home feddra && chmod 1777 /home/feddra
ENV HOME=/home/feddra
USER feddra
WORKDIR /work
ENTRYPOINT ["feddra-ds"]
CMD ["--help"]
