//! Finding the form in which a layout holds a layer.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use quant_core::{
    ActSpec, DType, DenseTensor, GridKind, GroupSize, ParamsKind, QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{FormatError, Layout, PlannedLayer, PlannedTensor, StoredModel, TensorSource};
use quant_methods::{LayerStats, LayerWeights, MethodOptions};
use serde_json::{Map, Value};

use super::exact::{Difference, difference};
use super::express::{Form, OffsetForm, bits_needed, express, offset_form};
use super::{ConvertConfig, Verdict};
use crate::error::Error;

/// Where layers are to go.
pub(super) struct Target<'a> {
    pub(super) layout: &'static dyn Layout,
    /// The model's `config.json`.
    pub(super) config: &'a Value,
    /// Equal after rounding to f16 is equal enough.
    pub(super) as_f16: bool,
    /// Layers that cannot be held may be rounded anew.
    pub(super) requantize: bool,
    /// What the layout has taken so far: tried first, for layers of a model are alike.
    accepted: Vec<Key>,
}

/// How a layer goes into the layout; enough to do it again.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) step: Step,
    pub(super) spec: QuantSpec,
    pub(super) input: ActSpec,
    pub(super) plan: Vec<PlannedTensor>,
    pub(super) verdict: Verdict,
    pub(super) difference: Difference,
}

/// What is done to the codes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// Put in another form.
    Express(Form),
    /// Rounded anew.
    Requantize,
}

impl Route {
    /// What people should know about it.
    pub(super) fn note(&self, source: &QuantizedLinear) -> String {
        let from = source.weight.spec();
        let mut notes = Vec::new();
        if matches!(self.step, Step::Requantize) {
            notes.push("rounded to nearest anew".to_owned());
        }
        if from.bits != self.spec.bits {
            notes.push(format!("{} bits in {}", from.bits, self.spec.bits));
        }
        if from.group != self.spec.group {
            notes.push(format!("groups of {} as {}", from.group, self.spec.group));
        }
        if from.act_order && !self.spec.act_order {
            notes.push("columns in natural order".to_owned());
        }
        if self.input != source.input {
            notes.push("activations are no longer quantized".to_owned());
        }
        notes.join("; ")
    }
}

impl<'a> Target<'a> {
    /// A layout for a model with this `config.json`.
    pub(super) fn new(layout: &'static dyn Layout, config: &'a Value, options: &ConvertConfig) -> Self {
        let ConvertConfig { as_f16, allow_requantize: requantize, .. } = *options;
        Self { layout, config, as_f16, requantize, accepted: Vec::new() }
    }

    /// The smallest form with the same real numbers; else the one that is nearest with the same codes; else, where
    /// allowed, codes made anew.
    pub(super) fn route(&mut self, module: &str, linear: &QuantizedLinear) -> Result<Route, Error> {
        let mut nearest: Option<Route> = None;
        let mut refusal = None;
        // Groups and bits change sizes, not numbers: what was tried in one form is not tried in a larger one.
        let mut tried: Vec<(Key, ActSpec)> = Vec::new();
        for (form, input) in self.forms(module, linear) {
            let key = Key::of(&form);
            if tried.contains(&(key, input.clone())) {
                continue;
            }
            let Some(matrix) = express(&linear.weight, &form) else { continue };
            tried.push((key, input.clone()));
            let apart = difference(&linear.weight, &matrix);
            // Writing is dear; only what would win is tried.
            if !self.same(&apart) && nearest.as_ref().is_some_and(|n| n.difference.max_abs <= apart.max_abs) {
                continue;
            }
            match self.try_form(module, linear, form, input) {
                Ok(route) => {
                    self.accepted.push(key);
                    if route.verdict == Verdict::Identical {
                        return Ok(route);
                    }
                    if nearest.as_ref().is_none_or(|n| route.difference.max_abs < n.difference.max_abs) {
                        nearest = Some(route);
                    }
                }
                Err(error) => {
                    // It may hold in other groups.
                    tried.pop();
                    refusal = Some(error);
                }
            }
        }
        match nearest {
            Some(route) => Ok(route),
            None if self.requantize => self.requantized(module, linear),
            None => {
                let layout = self.layout.id();
                let because = refusal.map_or_else(|| self.refusal(module, linear), |error| error.to_string());
                Err(Error::Convert { module: module.to_owned(), layout, because })
            }
        }
    }

    /// Why not even the layer as it is can be stored.
    fn refusal(&self, module: &str, linear: &QuantizedLinear) -> String {
        let (spec, matrix) = (linear.weight.spec(), &linear.weight);
        let layer = PlannedLayer::new(module, &spec, matrix.rows(), matrix.cols());
        match self.layout.can_store(&layer) {
            Err(refused) => refused.to_string(),
            Ok(()) => "its values have no form there".to_owned(),
        }
    }

    fn same(&self, apart: &Difference) -> bool {
        if self.as_f16 { apart.halves == 0 } else { apart.reals == 0 }
    }

    fn try_form(
        &self,
        module: &str,
        linear: &QuantizedLinear,
        form: Form,
        input: ActSpec,
    ) -> Result<Route, FormatError> {
        let step = Step::Express(form);
        let tensors = self.tensors(module, linear, &step, &form.spec, &input)?;
        let (plan, read) = self.read_back(module, &form.spec, &input, &tensors)?;
        let difference = difference(&linear.weight, &read.weight);
        let verdict = if self.same(&difference) { Verdict::Identical } else { Verdict::Bounded };
        Ok(Route { step, spec: form.spec, input, plan, verdict, difference })
    }

    /// The tensors of a layer on its route.
    pub(super) fn tensors(
        &self,
        module: &str,
        linear: &QuantizedLinear,
        step: &Step,
        spec: &QuantSpec,
        input: &ActSpec,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let weight = match step {
            Step::Express(form) => express(&linear.weight, form),
            Step::Requantize => rounded_anew(&linear.weight, spec),
        };
        let unsaid =
            || FormatError::Plan { tensor: module.to_owned(), problem: "it has no such form".into() };
        let weight = weight.ok_or_else(unsaid)?;
        let new = QuantizedLinear { weight, input: input.clone(), ..linear.clone() };
        self.layout.write(&new, module)
    }

    /// What the layout's own reader makes of the tensors: the proof that they hold what they should.
    fn read_back(
        &self,
        module: &str,
        spec: &QuantSpec,
        input: &ActSpec,
        tensors: &[(String, DenseTensor)],
    ) -> Result<(Vec<PlannedTensor>, QuantizedLinear), FormatError> {
        let meta = Map::new();
        let stored = StoredModel { spec, input, exceptions: &[], meta: &meta };
        let reader = self.layout.reader(&self.layout.config(&stored))?;
        let source = InMemory { tensors: tensors.iter().cloned().collect(), config: self.config };
        let read = reader.read(&source, module)?;
        Ok((tensors.iter().map(|(name, t)| PlannedTensor::of(name, t)).collect(), read))
    }

    fn requantized(&self, module: &str, linear: &QuantizedLinear) -> Result<Route, Error> {
        let (from, matrix) = (linear.weight.spec(), &linear.weight);
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let mut refusal = None;
        let bits = (from.bits..=8).chain((1..from.bits).rev());
        for bits in bits {
            for group in groups_for(&from, cols) {
                for symmetric in [from.symmetric, !from.symmetric] {
                    let scales = ParamsKind::F16;
                    let spec =
                        QuantSpec { bits, grid: GridKind::Int, group, scales, symmetric, act_order: false };
                    let layer =
                        PlannedLayer { bias: bias(linear), ..PlannedLayer::new(module, &spec, rows, cols) };
                    if let Err(refused) = self.layout.can_store(&layer) {
                        refusal = Some(refused.to_string());
                        continue;
                    }
                    let step = Step::Requantize;
                    let written = self.tensors(module, linear, &step, &spec, &ActSpec::Float);
                    let read =
                        written.and_then(|tensors| self.read_back(module, &spec, &ActSpec::Float, &tensors));
                    match read {
                        Ok((plan, read)) => {
                            let difference = difference(matrix, &read.weight);
                            let (verdict, input) = (Verdict::Requantized, ActSpec::Float);
                            return Ok(Route { step, spec, input, plan, verdict, difference });
                        }
                        Err(error) => refusal = Some(error.to_string()),
                    }
                }
            }
        }
        let because = refusal.unwrap_or_default();
        Err(Error::Convert { module: module.to_owned(), layout: self.layout.id(), because })
    }

    /// All forms that the layout may store, smallest first, and the inputs with them. Of forms of one size, those that
    /// it has taken before come first.
    fn forms(&self, module: &str, linear: &QuantizedLinear) -> Vec<(Form, ActSpec)> {
        let matrix = &linear.weight;
        let mut inputs = vec![linear.input.clone()];
        if linear.input != ActSpec::Float {
            inputs.push(ActSpec::Float);
        }
        let mut found = Vec::new();
        for input in inputs {
            for choice in choices(matrix) {
                let Some((spec, bytes)) = self.smallest_bits(module, linear, &choice, &input) else {
                    continue;
                };
                for offset in offsets_for(matrix, &spec) {
                    let form = Form { spec, offset };
                    let new = !self.accepted.contains(&Key::of(&form));
                    // Inputs that stay as they are come first, whatever the size.
                    found.push(((input != linear.input, bytes, new), form, input.clone()));
                }
            }
        }
        found.sort_by_key(|(rank, ..)| *rank);
        found.into_iter().map(|(_, form, input)| (form, input)).collect()
    }

    /// The specification with the fewest bits that can be stored, of those that hold the codes, and its bytes.
    fn smallest_bits(
        &self,
        module: &str,
        linear: &QuantizedLinear,
        choice: &Choice,
        input: &ActSpec,
    ) -> Option<(QuantSpec, u64)> {
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        choice.bits.clone().find_map(|bits| {
            let spec = QuantSpec { bits, ..choice.spec };
            let layer =
                PlannedLayer { bias: bias(linear), input, ..PlannedLayer::new(module, &spec, rows, cols) };
            self.layout.can_store(&layer).ok()?;
            let plan = self.layout.planned(&layer);
            Some((spec, plan.iter().filter_map(PlannedTensor::byte_len).sum()))
        })
    }
}

/// What a layout takes or does not take, whatever the size of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    grid: GridKind,
    scales: ParamsKind,
    symmetric: bool,
    act_order: bool,
    offset: OffsetForm,
}

impl Key {
    fn of(form: &Form) -> Self {
        let QuantSpec { grid, scales, symmetric, act_order, .. } = form.spec;
        Self { grid, scales, symmetric, act_order, offset: form.offset }
    }
}

/// A specification with the bits left open.
struct Choice {
    spec: QuantSpec,
    bits: RangeInclusive<u8>,
}

/// Every specification in which the codes of a matrix may be kept.
fn choices(matrix: &QuantizedMatrix) -> Vec<Choice> {
    let (from, cols) = (matrix.spec(), matrix.cols());
    let mut grids: Vec<(GridKind, bool, RangeInclusive<u8>)> = Vec::new();
    if from.grid != GridKind::Int {
        grids.push((from.grid, from.symmetric, from.bits..=from.bits));
    }
    for symmetric in [true, false] {
        if let Some(least) = bits_needed(matrix, symmetric) {
            grids.push((GridKind::Int, symmetric, least..=8));
        }
    }
    let kinds = [from.scales, ParamsKind::F16, ParamsKind::F32, ParamsKind::BF16, ParamsKind::E8M0];
    let orders = [from.act_order, false];
    let mut choices = Vec::new();
    for (grid, symmetric, bits) in grids {
        for group in groups_for(&from, cols) {
            for scales in distinct(&kinds) {
                for act_order in distinct(&orders) {
                    let spec = QuantSpec { grid, symmetric, group, scales, act_order, ..from };
                    choices.push(Choice { spec, bits: bits.clone() });
                }
            }
        }
    }
    choices
}

/// The entries without those that came before.
fn distinct<T: Copy + PartialEq>(list: &[T]) -> impl Iterator<Item = T> {
    list.iter().enumerate().filter(|(i, entry)| !list[..*i].contains(entry)).map(|(_, entry)| *entry)
}

/// The type of the bias.
fn bias(linear: &QuantizedLinear) -> Option<DType> {
    linear.bias.as_ref().map(DenseTensor::dtype)
}

/// The groups of a matrix, and those that lie inside them.
fn groups_for(from: &QuantSpec, cols: usize) -> Vec<GroupSize> {
    const LENGTHS: [usize; 9] = [16, 32, 64, 96, 128, 256, 512, 1024, 2048];
    let mut groups = vec![from.group, GroupSize::Row];
    let all = LENGTHS.into_iter().chain([from.group.len(cols)]).filter(|len| cols.is_multiple_of(*len));
    for len in all {
        groups.extend([GroupSize::Columns(len), GroupSize::Flat(len)]);
    }
    distinct(&groups).collect()
}

/// The ways to place zero that a specification leaves open.
fn offsets_for(matrix: &QuantizedMatrix, spec: &QuantSpec) -> Vec<OffsetForm> {
    let own = offset_form(&matrix.offset);
    if spec.grid != GridKind::Int {
        return own.into_iter().collect();
    }
    let mut forms = vec![OffsetForm::Middle, OffsetForm::Integer];
    if !spec.symmetric {
        forms = vec![OffsetForm::Integer];
        for kind in [ParamsKind::F16, ParamsKind::F32, ParamsKind::BF16] {
            forms.extend([
                OffsetForm::Float(kind),
                OffsetForm::Shift { sign: 1, kind },
                OffsetForm::Shift { sign: -1, kind },
            ]);
        }
        // Shifts of two levels, as those of k-quants.
        forms.extend(own.filter(|own| !forms.contains(own)));
    }
    forms
}

/// Rounds the values to the nearest code of `spec`.
fn rounded_anew(matrix: &QuantizedMatrix, spec: &QuantSpec) -> Option<QuantizedMatrix> {
    let rtn = quant_methods::quantizer("rtn", &MethodOptions::default()).ok()?;
    let layer = LayerWeights { w: matrix.dequantize(), spec: *spec };
    let done = rtn.quantize(vec![layer], LayerStats::default()).ok()?;
    done.into_iter().next().map(|quantized| quantized.matrix)
}

/// Tensors of one layer and the configuration of its model.
struct InMemory<'a> {
    tensors: BTreeMap<String, DenseTensor>,
    config: &'a Value,
}

impl TensorSource for InMemory<'_> {
    fn lookup(&self, name: &str) -> Option<(DType, &[usize])> {
        self.tensors.lookup(name)
    }

    fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        self.tensors.read(name)
    }

    fn model_config(&self) -> &Value {
        self.config
    }
}
