"""``attention:flash_v2``: fused TVA on the flash-attention kernel."""
