"""Networks for dense tasks: a frozen backbone's pyramid of maps under a neck and a head. One file per head."""
