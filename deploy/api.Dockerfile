# The API and the migrations. Without torch: about 600 MB, of which pyarrow takes 170 MB.
# docker build -f deploy/api.Dockerfile .
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY api api
COPY client client
COPY deploy deploy
COPY migrations migrations
COPY shared shared
COPY worker worker
RUN pip install -c constraints.txt .

RUN useradd --system --uid 10001 milliner
USER milliner
EXPOSE 8000
CMD ["python", "-m", "uvicorn", "api.app:app", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "5"]
