//! What is opened and planned at scale, headers only.

use super::released::{DeepSeek, Llama, Model};

/// Rows for what feeds a layer, columns for what leaves it, the rest whole (sharding of tensor-parallel experts).
pub(crate) const RULES: &str = r#"
rule = [
  { match = "**.{q,k,v,gate,up,q_b,kv_b}_proj.weight", shard = { dim = 0 } },
  { match = "**.{q_b,kv_b}_proj.weight_scale_inv", shard = { dim = 0 }, optional = true },
  { match = "**.{gate,up}_proj.weight_scale_inv", shard = { dim = 0 }, optional = true },
  { match = "**.{o,down}_proj.weight", shard = { dim = 1 } },
  { match = "**.{o,down}_proj.weight_scale_inv", shard = { dim = 1 }, optional = true },
  { match = "**", replicate = true },
]
"#;

pub(crate) fn models() -> [(&'static str, Model); 2] {
    [("llama-3.1-70b", Llama::LLAMA_3_1_70B.model()), ("deepseek-v3", DeepSeek::V3.model())]
}
