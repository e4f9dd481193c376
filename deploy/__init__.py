"""Run TorchServe and nginx in production: supervisor, readiness, containers, Kubernetes; and other servers."""
