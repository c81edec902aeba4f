//! setun-model
