# One image for every stage:
#
#   docker build -t distill-audio .
#   docker run --rm --gpus all -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" distill-audio \
#       accelerate launch distill/run.py configs/NAME.yaml
#
# Shared memory. Docker gives a container 64 MB of /dev/shm, which trainers that pass tensors between data workers fill
# until they die with "bus error". Workers here send samples through pipes, so 64 MB is enough for any number of them.
# NCCL is the exception: with two or more GPUs in one container it may exchange gradients there; add --shm-size=1g.
FROM python:3.12-slim

# gcc: Triton compiles kernels on first use, which torch.compile and bitsandbytes need. CUDA comes with the wheels.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /work
ENV PYTHONUNBUFFERED=1 HF_HOME=/work/data/hub

# The packages change seldom and weigh 5 GB: a layer of their own, which an edit of the code leaves alone.
COPY constraints.txt .
RUN pip install --no-cache-dir -r constraints.txt

COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[test]"

CMD ["distill", "--help"]
