"""`longhaul verify`: N ranks equal one, for outputs, states and every gradient on every rank."""
