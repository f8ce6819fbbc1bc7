# For hosts with NVIDIA GPUs: JAX's wheels bring CUDA, the host its driver and container toolkit.
# From the root of the checkout:
#   docker build -f launch/docker/gpu.Dockerfile --build-arg REVISION="$(git rev-parse HEAD)" -t IMAGE .
#   docker run --rm --gpus all IMAGE -m experiments.run --config=... --workdir=...
FROM python:3.12-slim

WORKDIR /tokenloom
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[gpu]'

# What results name as their commit. A launcher's copy of the checkout has the file already.
ARG REVISION=unknown
RUN test -f REVISION || echo "${REVISION}" > REVISION

ENV PYTHONUNBUFFERED=1
# Read by NVIDIA's container toolkit: which devices and driver libraries the container sees.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Python is process 1, so SIGTERM reaches the training loop, which saves and exits with 143.
ENTRYPOINT ["python"]
CMD ["-m", "experiments.generate", "--list_methods"]
