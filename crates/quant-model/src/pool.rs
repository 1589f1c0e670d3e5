//! One vector per text, from one per token.

use ndarray::ArrayView2;
use serde_json::Value;

use crate::error::ConfigError;

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first one: BERT's `[CLS]`.
    Cls,
    /// The last one, which in a decoder has seen the whole text.
    Last,
}

impl Pooling {
    /// Reads the `1_Pooling/config.json` of sentence-transformers.
    pub fn from_config(config: &Value) -> Result<Self, ConfigError> {
        const PREFIX: &str = "pooling_mode_";
        let flags = config.as_object().into_iter().flatten();
        let asked: Vec<&str> = flags
            .filter(|(_, on)| on.as_bool() == Some(true))
            .filter_map(|(key, _)| key.strip_prefix(PREFIX))
            .collect();
        match asked[..] {
            ["mean_tokens"] => Ok(Pooling::Mean),
            ["cls_token"] => Ok(Pooling::Cls),
            ["lasttoken"] => Ok(Pooling::Last),
            _ => Err(ConfigError::Value {
                field: format!("{PREFIX}* of 1_Pooling/config.json"),
                expected: "one of mean_tokens, cls_token, lasttoken; choose one with --pooling".to_owned(),
                found: if asked.is_empty() {
                    "none".to_owned()
                } else {
                    asked.join(", ").escape_default().to_string()
                },
            }),
        }
    }

    /// One vector `[hidden]` from `hidden_states`: `[tokens, hidden]`. No tokens give zeros.
    pub fn pool(self, hidden_states: ArrayView2<'_, f32>) -> Vec<f32> {
        let (tokens, hidden) = hidden_states.dim();
        if tokens == 0 {
            return vec![0.0; hidden];
        }
        match self {
            Pooling::Cls => hidden_states.row(0).to_vec(),
            Pooling::Last => hidden_states.row(tokens - 1).to_vec(),
            Pooling::Mean => {
                let mut sum = vec![0.0f64; hidden];
                for row in hidden_states.rows() {
                    sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x));
                }
                sum.into_iter().map(|s| (s / tokens as f64) as f32).collect()
            }
        }
    }
}

/// Scales a vector to length 1. Zeros stay zeros.
pub fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;
    use serde_json::json;

    #[test]
    fn vectors_by_hand() {
        let x = array![[1.0, -2.0], [3.0, 0.0], [5.0, 5.0]];
        assert_eq!(Pooling::Mean.pool(x.view()), [3.0, 1.0]);
        assert_eq!(Pooling::Cls.pool(x.view()), [1.0, -2.0]);
        assert_eq!(Pooling::Last.pool(x.view()), [5.0, 5.0]);
        assert_eq!(Pooling::Mean.pool(ArrayView2::from_shape((0, 2), &[]).unwrap()), [0.0, 0.0]);
        let mut v = [3.0, 4.0];
        normalize(&mut v);
        assert_eq!(v, [0.6, 0.8]);
        let mut zero = [0.0; 2];
        normalize(&mut zero);
        assert_eq!(zero, [0.0; 2]);
    }

    #[test]
    fn the_configuration_of_sentence_transformers() {
        let config = json!({
            "word_embedding_dimension": 384, "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false,
        });
        assert_eq!(Pooling::from_config(&config), Ok(Pooling::Mean));
        let last = json!({ "pooling_mode_lasttoken": true });
        assert_eq!(Pooling::from_config(&last), Ok(Pooling::Last));
        for bad in [json!({}), json!({ "pooling_mode_max_tokens": true }), json!([1])] {
            let error = Pooling::from_config(&bad).unwrap_err().to_string();
            assert!(error.contains("mean_tokens"), "{error}");
        }
    }
}
