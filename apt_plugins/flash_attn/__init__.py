"""``attention:flash_v2`` and ``attention:flex``: attention on kernels of others."""
