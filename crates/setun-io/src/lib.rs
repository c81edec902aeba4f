//! setun-io
