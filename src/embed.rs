//! Vectors of texts.

use std::path::{Component, Path};

use ndarray::Array2;
use quant_formats::Checkpoint;
use quant_model::{
    ArchSpec, ConfigError, Decoder, Encoder, MemoryFootprint, Pooling, PositionSpec, Tokenizer, normalize,
};
use rayon::prelude::*;
use serde_json::Value;

use crate::error::Error;
use crate::model::read_tokenizer;

/// A model that turns texts into vectors: an encoder, or a decoder whose hidden states are used.
///
/// What the files of sentence-transformers say (`modules.json`, `1_Pooling/config.json`,
/// `sentence_bert_config.json`) is followed; without them an encoder pools by the mean and a decoder takes the last
/// token.
pub struct Embedder {
    network: Network,
    tokenizer: Tokenizer,
    /// How the vectors of tokens become one.
    pub pooling: Pooling,
    /// Scale each vector to length 1.
    pub normalize: bool,
    /// Tokens of a text at most; the rest is cut.
    pub max_tokens: usize,
}

enum Network {
    Encoder(Encoder),
    Decoder(Decoder),
}

/// Vectors of some texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedded {
    /// `[texts, hidden]`.
    pub vectors: Array2<f32>,
    /// Tokens of all texts, special ones included.
    pub tokens: usize,
    /// Texts that were longer than the model allows and lost their ends.
    pub cut: usize,
}

/// True if the model at `path` is an encoder, which has hidden states but no logits.
pub fn is_encoder(path: &Path) -> Result<bool, Error> {
    let checkpoint = Checkpoint::open_container(path)?;
    Ok(!ArchSpec::from_config(checkpoint.config())?.causal)
}

impl Embedder {
    /// Loads a model directory, float or quantized in any known layout. `pooling` overrides what its files ask for.
    pub fn open(path: &Path, pooling: Option<Pooling>) -> Result<Self, Error> {
        let model = EncoderModel::open(path)?;
        let tokenizer = read_tokenizer(&model.checkpoint)?;
        let spec = model.spec();
        let causal = spec.causal;
        let positions = match spec.positions {
            PositionSpec::Learned => spec.max_positions,
            PositionSpec::Rope(_) => usize::MAX,
        };
        let modules = Modules::read(&model.checkpoint)?;
        if let (None, Some(found)) = (pooling, modules.unknown) {
            return Err(Error::Module { found });
        }
        let default = if causal { Pooling::Last } else { Pooling::Mean };
        Ok(Self {
            network: model.network,
            tokenizer,
            pooling: pooling.or(modules.pooling.transpose()?).unwrap_or(default),
            normalize: modules.normalize,
            max_tokens: modules.max_tokens.unwrap_or(usize::MAX).min(positions),
        })
    }

    /// Bytes of the weights in memory.
    pub fn memory_footprint(&self) -> MemoryFootprint {
        match &self.network {
            Network::Encoder(encoder) => encoder.memory_footprint(),
            Network::Decoder(decoder) => decoder.memory_footprint(),
        }
    }

    /// A vector for each text. Texts run side by side; a vector does not depend on the others.
    pub fn embed(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Embedded, Error> {
        let results: Vec<(Vec<f32>, usize, bool)> = texts
            .par_iter()
            .map(|text| {
                let (ids, cut) = self.encode(text.as_ref())?;
                let states = self.network.hidden_states(&ids)?;
                let mut vector = self.pooling.pool(states.view());
                if self.normalize {
                    normalize(&mut vector);
                }
                Ok((vector, ids.len(), cut))
            })
            .collect::<Result<_, Error>>()?;
        let hidden = self.network.spec().hidden_size;
        let values = results.iter().flat_map(|(vector, ..)| vector.iter().copied()).collect();
        Ok(Embedded {
            vectors: Array2::from_shape_vec((texts.len(), hidden), values).expect("vectors have one length"),
            tokens: results.iter().map(|(_, tokens, _)| tokens).sum(),
            cut: results.iter().filter(|(.., cut)| *cut).count(),
        })
    }

    /// Token ids of a text with its special tokens, and whether it had to be cut. Special tokens stay.
    fn encode(&self, text: &str) -> Result<(Vec<u32>, bool), Error> {
        let whole = self.tokenizer.encode(text, true)?;
        if whole.len() <= self.max_tokens {
            return Ok((whole, false));
        }
        let plain = self.tokenizer.encode(text, false)?;
        let special = whole.len().saturating_sub(plain.len());
        let before = (0..=special).find(|&at| whole[at..].starts_with(&plain)).unwrap_or(0);
        let keep = self.max_tokens.saturating_sub(special).min(plain.len());
        let mut ids = whole[..before].to_vec();
        ids.extend(&plain[..keep]);
        ids.extend(&whole[before + plain.len()..]);
        ids.truncate(self.max_tokens);
        Ok((ids, true))
    }
}

impl Network {
    fn spec(&self) -> &ArchSpec {
        match self {
            Network::Encoder(encoder) => encoder.spec(),
            Network::Decoder(decoder) => decoder.spec(),
        }
    }

    fn hidden_states(&self, ids: &[u32]) -> Result<Array2<f32>, Error> {
        Ok(match self {
            Network::Encoder(encoder) => encoder.hidden_states(ids)?,
            Network::Decoder(decoder) => decoder.hidden_states(ids)?,
        })
    }
}

/// An encoder (or a decoder seen as one) and its files.
pub struct EncoderModel {
    network: Network,
    checkpoint: Checkpoint,
}

impl EncoderModel {
    /// Loads a model directory.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let config = checkpoint.config();
        let network = match ArchSpec::from_config(config)?.causal {
            true => Network::Decoder(Decoder::load(config, &checkpoint)?),
            false => Network::Encoder(Encoder::load(config, &checkpoint)?),
        };
        Ok(Self { network, checkpoint })
    }

    /// The architecture.
    pub fn spec(&self) -> &ArchSpec {
        self.network.spec()
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        read_tokenizer(&self.checkpoint)
    }

    /// The last hidden state `[ids, hidden]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Result<Array2<f32>, Error> {
        self.network.hidden_states(ids)
    }
}

/// What the files of sentence-transformers ask for.
#[derive(Debug, Default)]
struct Modules {
    pooling: Option<Result<Pooling, ConfigError>>,
    normalize: bool,
    max_tokens: Option<usize>,
    /// A module that cannot be followed.
    unknown: Option<String>,
}

impl Modules {
    fn read(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let mut found = Self::default();
        if let Some(metadata) = checkpoint.gguf_metadata() {
            let arch = metadata.text("general.architecture")?.unwrap_or_default();
            found.pooling = match metadata.number(&format!("{arch}.pooling_type"))? {
                Some(1) => Some(Ok(Pooling::Mean)),
                Some(2) => Some(Ok(Pooling::Cls)),
                Some(3) => Some(Ok(Pooling::Last)),
                _ => None,
            };
            return Ok(found);
        }
        let Some(list) = checkpoint.json_file("modules.json")? else { return Ok(found) };
        for module in list.as_array().into_iter().flatten() {
            let kind = module["type"].as_str().unwrap_or_default();
            match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Normalize" => found.normalize = true,
                "Pooling" => {
                    let folder = module["path"].as_str().unwrap_or_default();
                    let inside = Path::new(folder).components().all(|c| matches!(c, Component::Normal(_)));
                    let name = if inside { folder } else { "1_Pooling" };
                    let config = checkpoint.json_file(&format!("{name}/config.json"))?;
                    found.pooling = config.as_ref().map(Pooling::from_config);
                }
                _ => {
                    found.unknown = Some(kind.chars().take(60).flat_map(char::escape_default).collect());
                }
            }
        }
        let limits = checkpoint.json_file("sentence_bert_config.json")?.unwrap_or(Value::Null);
        found.max_tokens = limits["max_seq_length"].as_u64().map(|n| n.max(1) as usize);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bert(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(quant_testkit::fixtures_dir().join("golden/base-bert")).unwrap() {
            let from = entry.unwrap().path();
            std::fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
        }
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn vectors_follow_the_files_of_sentence_transformers() {
        let modules = r#"[{"type": "sentence_transformers.models.Transformer", "path": ""},
            {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}]"#;
        let folder = bert(&[
            ("modules.json", modules),
            ("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#),
            ("sentence_bert_config.json", r#"{"max_seq_length": 4}"#),
        ]);
        let embedder = Embedder::open(folder.path(), None).unwrap();
        assert_eq!((embedder.pooling, embedder.normalize, embedder.max_tokens), (Pooling::Cls, true, 4));
        let both = embedder.embed(&["t3 t4", "t5 t6 t7 t8 t9"]).unwrap();
        assert_eq!((both.vectors.dim(), both.cut, both.tokens), ((2, 128), 1, 6));
        for (row, text) in both.vectors.rows().into_iter().zip(["t3 t4", "t5 t6 t7 t8"]) {
            let alone = embedder.embed(&[text]).unwrap().vectors;
            assert_eq!(row, alone.row(0), "a vector depends on its own text, up to the limit");
            let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            assert!((length - 1.0).abs() < 1e-6, "{length}");
        }
        let model = EncoderModel::open(folder.path()).unwrap();
        let ids = model.tokenizer().unwrap().encode("t3 t4", true).unwrap();
        let mut first = model.hidden_states(&ids).unwrap().row(0).to_vec();
        normalize(&mut first);
        assert_eq!(both.vectors.row(0).to_vec(), first);
    }

    #[test]
    fn without_such_files_the_mean_of_all_tokens() {
        let embedder = Embedder::open(bert(&[]).path(), None).unwrap();
        assert_eq!((embedder.pooling, embedder.normalize, embedder.max_tokens), (Pooling::Mean, false, 256));
        let decoder = Embedder::open(&quant_testkit::fixtures_dir().join("golden/base-llama"), None).unwrap();
        assert_eq!(decoder.pooling, Pooling::Last);
        assert_eq!(decoder.embed(&["t3 t4 t5"]).unwrap().vectors.dim(), (1, 128));
        let dense = bert(&[("modules.json", r#"[{"type": "sentence_transformers.models.Dense"}]"#)]);
        assert!(Embedder::open(dense.path(), None).err().unwrap().to_string().contains("Dense"));
        assert_eq!(Embedder::open(dense.path(), Some(Pooling::Cls)).unwrap().pooling, Pooling::Cls);
        let outside = r#"[{"type": "Pooling", "path": "../../etc"}]"#;
        let outside = Embedder::open(bert(&[("modules.json", outside)]).path(), None).unwrap();
        assert_eq!(outside.pooling, Pooling::Mean, "paths out of the model are not followed");
    }
}
