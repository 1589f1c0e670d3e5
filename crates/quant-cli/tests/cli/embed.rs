//! Vectors of texts, and hidden states of encoders.

use std::fs;

use quant_testkit::{Golden, assets, fixtures_dir};

use crate::support::{has_keys, quant, text};

#[test]
fn hidden_states_are_those_of_the_reference() {
    let golden = Golden::open("base-bert");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("states.safetensors");
    let ids: Vec<String> = golden.ids("input_ids").iter().map(ToString::to_string).collect();
    let run = quant(&["logits", text(golden.dir()), "--ids", &ids.join(","), "--out", text(&out), "--json"]);
    assert_eq!(run.ok().json()["hidden_size"], 128);
    let (ours, theirs) = (Golden::read(&out).f32("last_hidden_state"), golden.f32("last_hidden_state"));
    // The derived bound is held in the model's own tests; here a wrong tensor would be off by its whole scale.
    let scale = theirs.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-4 * scale));
    quant(&["generate", text(golden.dir()), "--prompt", "t3"]).fails(&["encoder"]);
}

#[test]
fn vectors_are_lines_arrays_or_json() {
    let model = fixtures_dir().join("golden/base-bert");
    let folder = tempfile::tempdir().unwrap();
    let (lines, out) = (folder.path().join("lines.txt"), folder.path().join("out.npy"));
    fs::write(&lines, "t3 t4 t5\nt6\n").unwrap();
    let embed = |more: &[&str]| {
        let mut args = vec!["embed", text(&model)];
        args.extend(more);
        quant(&args)
    };
    let printed = embed(&["--file", text(&lines)]).ok().stdout;
    let vectors: Vec<Vec<f32>> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((vectors.len(), vectors[0].len()), (2, 128));

    let report = embed(&["--text", "t3 t4 t5", "--text", "t6", "--json"]).ok().json();
    has_keys(&report, &[("texts", 'n'), ("tokens", 'n'), ("hidden_size", 'n'), ("embeddings", 'a')]);
    let again: Vec<Vec<f32>> = serde_json::from_value(report["embeddings"].clone()).unwrap();
    assert_eq!((again, &report["tokens"], &report["pooling"]), (vectors.clone(), &4.into(), &"mean".into()));

    embed(&["--file", text(&lines), "--format", "npy", "--out", text(&out), "--normalize"]).ok();
    let bytes = fs::read(&out).unwrap();
    assert_eq!(bytes.len(), 128 + 2 * 128 * 4);
    let values: Vec<f32> = bytes[128..].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let length = vectors[0].iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!(values.iter().zip(&vectors[0]).all(|(a, b)| (a - b / length).abs() < 1e-6));

    let first = embed(&["--text", "t3 t4 t5", "--pooling", "cls"]).ok().stdout;
    let last = embed(&["--text", "t3 t4 t5", "--pooling", "last"]).ok().stdout;
    assert!(first != last && !printed.starts_with(&first));
    embed(&["--text", "t3", "--format", "npy", "--json"]).ends(2, &["--out"]);
    embed(&[]).ends(2, &["--text"]);
}

/// A real sentence encoder against human judgement. The reference (torch, the same f16 weights) has a rank correlation
/// of 0.91345 on these pairs; other sums move no rank far.
#[test]
fn a_trained_encoder_judges_as_its_reference() {
    let Some(model) = assets("models/all-MiniLM-L6-v2") else { return };
    let Some(pairs) = assets("text/sts/sts_dev_images_snli.tsv") else { return };
    let table = fs::read_to_string(pairs).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().skip(1).map(|line| line.split('\t').collect()).collect();
    let folder = tempfile::tempdir().unwrap();
    let (lines, out) = (folder.path().join("lines.txt"), folder.path().join("out.npy"));
    let sentences: Vec<String> = rows.iter().map(|row| format!("{}\n{}\n", row[3], row[4])).collect();
    fs::write(&lines, sentences.concat()).unwrap();
    let args =
        ["embed", text(&model), "--file", text(&lines), "--format", "npy", "--out", text(&out), "--json"];
    let report = quant(&args).ok().json();
    assert_eq!((&report["hidden_size"], &report["normalize"]), (&384.into(), &true.into()));
    let bytes = fs::read(&out).unwrap();
    let values: Vec<f32> = bytes[128..].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let vectors: Vec<&[f32]> = values.chunks(384).collect();
    let cosine = |pair: &[&[f32]]| pair[0].iter().zip(pair[1]).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let ours: Vec<f64> = vectors.chunks(2).map(cosine).collect();
    let scores: Vec<f64> = rows.iter().map(|row| row[2].parse().unwrap()).collect();
    let correlation = pearson(&ranks(&ours), &ranks(&scores));
    eprintln!("rank correlation {correlation:.5}, {} s", report["seconds"]);
    assert!((correlation - 0.91345).abs() < 2e-4, "{correlation}");
}

/// Ranks from 1; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let rank = |x: &f64| {
        let below = values.iter().filter(|v| *v < x).count();
        let equal = values.iter().filter(|v| *v == x).count();
        below as f64 + (equal + 1) as f64 / 2.0
    };
    values.iter().map(rank).collect()
}

fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let covariance: f64 = a.iter().zip(b).map(|(x, y)| (x - ma) * (y - mb)).sum();
    let deviation = |v: &[f64], m: f64| v.iter().map(|x| (x - m).powi(2)).sum::<f64>().sqrt();
    covariance / (deviation(a, ma) * deviation(b, mb))
}
