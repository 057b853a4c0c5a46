"""HTTPS between silos and the coordinator: TLS 1.3, client certificates, proxies, and faults in plain words."""
