# For TPU hosts (GKE, Vertex AI). From the root of the checkout:
#   docker build -f launch/docker/tpu.Dockerfile --build-arg REVISION="$(git rev-parse HEAD)" -t IMAGE .
#   docker run --rm --privileged --net=host IMAGE -m experiments.run --config=... --workdir=...
FROM python:3.12-slim

WORKDIR /tokenloom
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[tpu]'

# What results name as their commit. A launcher's copy of the checkout has the file already.
ARG REVISION=unknown
RUN test -f REVISION || echo "${REVISION}" > REVISION

ENV PYTHONUNBUFFERED=1
# Python is process 1, so SIGTERM reaches the training loop, which saves and exits with 143.
ENTRYPOINT ["python"]
CMD ["-m", "experiments.generate", "--list_methods"]
