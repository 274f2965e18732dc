//! LoRA adapters of a model, as PEFT's `save_pretrained` writes them.

use serde_json::json;
use shardlift::Dtype;

use super::{Model, Scheme, Tensors};

impl Model {
    /// An adapter of this rank (`r`) for every weight whose module ends in one of these names (`target_modules`): A is
    /// [rank, in] and B is [out, rank], in F32.
    pub(crate) fn adapter(&self, rank: u64, modules: &[&str]) -> Model {
        let mut tensors = Tensors::new(Dtype::F32, Scheme::None);
        for tensor in &self.tensors {
            let Some(module) = tensor.name.strip_suffix(".weight") else { continue };
            if let [rows, columns] = tensor.shape[..]
                && modules.contains(&module.rsplit('.').next().expect("a split has a last part"))
            {
                tensors.plain(format!("base_model.model.{module}.lora_A.weight"), &[rank, columns]);
                tensors.plain(format!("base_model.model.{module}.lora_B.weight"), &[rows, rank]);
            }
        }
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
            "target_modules": modules, "fan_in_fan_out": false, "use_rslora": false,
        });
        Model { config, tensors: tensors.list, files: 1, stem: "adapter_model", config_name: "adapter_config.json" }
    }
}
