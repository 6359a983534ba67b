# A worker of either queue. torch's wheels include CUDA; the host needs only the NVIDIA driver and container toolkit.
# docker build -f deploy/worker.Dockerfile .
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Trainers use jemalloc where it is installed (shared/allocator.py).
RUN apt-get update && apt-get install -y --no-install-recommends libjemalloc2 && rm -rf /var/lib/apt/lists/*
WORKDIR /app

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY api api
COPY client client
COPY deploy deploy
COPY migrations migrations
COPY shared shared
COPY worker worker
RUN pip install -c constraints.txt '.[worker,trackers]'

# Create the folder here so that the volume mounted over it belongs to the same user.
RUN useradd --system --uid 10001 milliner && install -d -o milliner /var/cache/milliner
ENV MILLINER_CACHE_DIR=/var/cache/milliner HOME=/var/cache/milliner
USER milliner
CMD ["celery", "-A", "worker.app", "worker", "-Q", "train", "-c", "1", "-n", "train@%h", "--without-gossip", "--without-mingle"]
