//! How a run starts: its first weights, or what it goes on from.

use super::{Observer, Session};
use crate::TrainError;
use crate::report::record::ProjectionCost;
use crate::settings::{SETTINGS_FILE, Settings};
use serde_json::Value;
use setun_infer::load_parameters;
use setun_io::{Matrix, OpenModel};
use setun_model::Form;
use setun_ternary::PackedMatrix;
use std::path::Path;

/// Refuses to go on with other settings than a run began with, which `run.json` knows: those of the
/// model and of training, but for what changes no result.
pub(super) fn check_unchanged(run: &Path, settings: &Settings) -> Result<(), TrainError> {
    // Without a record there is nothing to hold them against.
    let record = std::fs::read(run.join("run.json")).unwrap_or_default();
    let record: Value = serde_json::from_slice(&record).unwrap_or_default();
    let now = super::settings_json(settings);
    for section in ["model", "train"] {
        let keys = now[section].as_object().into_iter().flatten();
        for (key, value) in
            keys.filter(|(key, _)| !["recompute", "head_chunk"].contains(&key.as_str()))
        {
            let before = &record["settings"][section][key];
            if !before.is_null() && before != value {
                let file = run.join(SETTINGS_FILE);
                return Err(TrainError::refused(format!(
                    "{}: {section}.{key} is {value}, but the run began with {before}; put that back, or \
                     start a new run with --init {}",
                    file.display(),
                    run.display()
                )));
            }
        }
    }
    Ok(())
}

impl Session {
    /// Sets the first weights: random, or those of another model.
    pub(super) fn initialize(
        &mut self,
        init: Option<&OpenModel>,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let parameters = &self.trainer.model.parameters;
        let m = &self.settings.model;
        match init {
            None => {
                let layers = 2.0 * m.num_hidden_layers as f64;
                let scale = if m.init_depth_scale {
                    layers.sqrt().recip()
                } else {
                    1.0
                };
                let seed = self.settings.run.seed;
                parameters.initialize(&mut self.trainer.backend, seed, m.init_std, scale)?;
            }
            Some(model) => {
                load_parameters(model, parameters, &mut self.trainer.backend)?;
                self.take_latents(model, observer)?;
            }
        }
        self.trainer.project()?;
        // Random weights have no quality to lose.
        let dense = init.is_some_and(|model| model.ternary().is_none());
        if dense && self.settings.model.ternary {
            self.measure_projection(observer)?;
        }
        Ok(())
    }

    /// Notes the held-out loss of the dense model and of its projection.
    fn measure_projection(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let trainer = &mut self.trainer;
        trainer.model.parameters.set_form(Form::Latent);
        let before = self.evaluator.run(&mut trainer.backend, &trainer.model)?;
        trainer.model.parameters.set_form(Form::Ternary);
        let after = self.evaluator.run(&mut trainer.backend, &trainer.model)?;
        observer.message(&format!(
            "held-out loss before projection {:.4}, after it {:.4} ({:.4} and {:.4} bits per byte)",
            before.loss, after.loss, before.bits_per_byte, after.bits_per_byte
        ));
        self.record.projection = Some(ProjectionCost {
            before: before.loss,
            after: after.loss,
        });
        self.write_record()
    }

    /// Takes the latent weights of a checkpoint, where the same trits and scales follow from
    /// them: what is rebuilt from trits alone has forgotten how far each weight is from the
    /// next one.
    fn take_latents(
        &mut self,
        model: &OpenModel,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let settings = &self.settings.model;
        let (parameters, backend) = (&self.trainer.model.parameters, &mut self.trainer.backend);
        let (mut taken, mut rebuilt) = (0, 0);
        for p in parameters.list.iter().filter(|p| p.ternary.is_some()) {
            let Matrix::Ternary(matrix) = model.matrix(&p.name)? else {
                continue;
            };
            let latents = model.latents(&p.name)?.filter(|latents| {
                let (size, rule) = (settings.group_size, settings.scale_rule);
                PackedMatrix::from_latents(latents, p.cols, size, rule).as_ref() == Ok(&matrix)
            });
            match latents {
                Some(latents) => {
                    parameters.set_values(backend, &p.name, &latents)?;
                    taken += 1;
                }
                None => rebuilt += 1,
            }
        }
        match (taken, rebuilt) {
            (_, 0) => {}
            (0, _) => observer.message(
                "the model has no latent weights that give its trits; they are rebuilt from the \
                 trits, which then change more slowly at first",
            ),
            _ => observer.message(&format!(
                "{rebuilt} matrices have no latent weights that give their trits; those are \
                 rebuilt from the trits"
            )),
        }
        Ok(())
    }
}
