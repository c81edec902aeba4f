//! setun-formats
