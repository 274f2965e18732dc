//! Casts and permutations that are refused, and what their errors say.

#[path = "support/tiny.rs"]
mod tiny;

use shardlift::plan::{Expr, Plan, World};
use shardlift::{Cast, Checkpoint, Dtype, Error, ErrorKind, Rank, Rules};

use tiny::tiny;

fn refused(checkpoint: &Checkpoint, rules: &Rules) -> Error {
    let error = Plan::new(checkpoint, rules, &World::host(2)).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Rules);
    error
}

#[test]
fn other_types_are_refused_with_rule_tensor_and_pair() {
    for &dtype in Dtype::ALL {
        let (_folder, checkpoint) = tiny(&[("x.w", dtype, &[4, 2])]);
        let castable = matches!(dtype, Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F8E4M3 | Dtype::F8E5M2);
        for to in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let rules = Rules::new().replicate("*.w").cast(to);
            let only = Rules::new().only("*.w", Rank(1)).cast(to);
            if castable {
                for rules in [&rules, &only, &rules.clone().transpose()] {
                    let plan = Plan::new(&checkpoint, rules, &World::host(2)).unwrap();
                    assert_eq!(plan.params()[0].dtype, to);
                    assert_eq!(plan.params()[0].cast, Cast::new(dtype, to).ok());
                }
                continue;
            }
            for rules in [&rules, &only] {
                let error = refused(&checkpoint, rules);
                assert_eq!((error.rule(), error.tensor()), (Some("cast"), Some("x.w")));
                assert!(error.message().starts_with("rule `*.w`: "), "{error}");
                assert_eq!(error.found(), Some(&*format!("{dtype} to {to}")));
            }
        }
        let transposed = Plan::new(&checkpoint, &Rules::new().replicate("*.w").transpose(), &World::host(1));
        if matches!(dtype, Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64) {
            assert_eq!(transposed.unwrap().rank(Rank(0)).dests[0].shape.dims(), [2, 4]);
        } else {
            let error = transposed.unwrap_err();
            assert_eq!(
                (error.rule(), error.tensor(), error.found()),
                (Some("permute"), Some("x.w"), Some(dtype.name()))
            );
            assert!(error.message().starts_with("rule `*.w`: "), "{error}");
        }
    }
}

#[test]
fn an_f8_that_is_scaled_is_not_cast() {
    for (name, scale) in [
        ("l.0.q.weight", "l.0.q.weight_scale"),
        ("l.0.q.weight", "l.0.q.weight_scale_inv"),
        ("l.0.q.weight", "l.0.q.scale"),
        ("l.0.q.weight", "l.0.q.weight.scale"),
        ("l.0.q.weight", "l.0.q.weight._scale"),
        ("l.0.q.weight", "l.0.q.input_scale"),
        ("l.0.q.weight", "l.0.q.scale_weight"),
        ("l.0.q.weight", "l.0.q.scales"),
        ("l.0.experts.down_proj", "l.0.experts.down_proj_scale"),
        ("l.0.in_proj_weight", "l.0.in_proj_scale_inv"),
    ] {
        let (_folder, checkpoint) = tiny(&[(name, Dtype::F8E4M3, &[4, 4]), (scale, Dtype::F32, &[1])]);
        let error = refused(&checkpoint, &Rules::new().replicate(name).cast(Dtype::Bf16).replicate("**"));
        assert_eq!((error.rule(), error.tensor()), (Some("cast"), Some(name)), "{scale}");
        assert_eq!(error.found(), Some(&*format!("`{scale}`")));
        assert!(
            error.message().contains(&format!("rule `{name}`: F8_E4M3 that is scaled is not cast to BF16")),
            "{error}"
        );
        // Left as it is, it is nobody's business.
        Plan::new(&checkpoint, &Rules::replicate_all().casting(Dtype::Bf16), &World::host(1)).unwrap();
    }
    for (name, other) in [
        ("l.0.q.weight", "l.0.k.weight_scale"),
        ("l.1.q.weight", "l.10.q.weight_scale"),
        ("l.0.q.weight", "l.0.q_norm.scale"),
        ("l.0.scale.weight", "l.0.scale.bias"),
        ("l.0.q.weight_scale", "l.0.q.weight"),
        ("w", "ws.scale"),
    ] {
        let (_folder, checkpoint) = tiny(&[(name, Dtype::F8E5M2, &[4, 4]), (other, Dtype::F32, &[1])]);
        Plan::new(&checkpoint, &Rules::new().replicate(name).cast(Dtype::F16).replicate("**"), &World::host(1))
            .unwrap();
    }
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let (_folder, checkpoint) = tiny(&[("w", Dtype::F32, &[4, 2])]);
    let replicate = || Rules::new().replicate("w");
    for (rules, rule, what) in [
        (
            replicate().cast(Dtype::F64),
            "cast",
            "rule `w`: no such type to cast to: expected one of BF16, F16, F32, found F64",
        ),
        (replicate().cast(Dtype::F8E4M3), "cast", "found F8_E4M3"),
        (replicate().cast(Dtype::F16).cast(Dtype::Bf16), "cast", "rule `w`: elements are cast twice"),
        (replicate().cast(Dtype::F16).keep_dtype(), "cast", "rule `w`: casts to F16 what keeps its type"),
        (replicate().casting(Dtype::I8), "cast", "no such type to cast to"),
        (
            replicate().permute(&[0, 0]),
            "permute",
            "rule `w`: not an order of dimensions: expected each of 0 to 1 once, found [0, 0]",
        ),
        (replicate().permute(&[1, 2]), "permute", "found [1, 2]"),
        (
            replicate().permute(&[2, 1, 0]),
            "permute",
            "rule `w`: tensor has another number of dimensions: expected 3 for [2, 1, 0], found 2",
        ),
        (Rules::new().cast(Dtype::F16), "cast", "cast() before any rule"),
        (Rules::new().skip("w").transpose(), "permute", "permute of a tensor that is skipped"),
        (Rules::new().shard("w", 0).transpose().place("x", Expr::Source), "unused-rule", "no tensor matches"),
    ] {
        let error = refused(&checkpoint, &rules);
        assert!(error.rule() == Some(rule) && error.to_string().contains(what), "{error}");
    }
    for (rest, what) in [
        ("replicate = true, cast = 'f64'", "no such type to cast to: expected one of bf16, f16, f32, found `f64`"),
        ("replicate = true, cast = 'BF16'", "found `BF16`"),
        ("replicate = true, transpose = false", "transpose: says nothing: expected true, found `false`"),
        ("replicate = true, transpose = true, permute = [1, 0]", "has both transpose and permute"),
        ("replicate = true, permute = [-1, 0]", "permute: out of range: expected 0 or more, found -1"),
        ("replicate = true, cast = 'f16', keep_dtype = true", "has both cast and keep_dtype"),
        ("skip = true, keep_dtype = true", "keep_dtype of a tensor that is skipped"),
        ("skip = true, cast = 'f16'", "cast of a tensor that is skipped"),
        ("skip = true, transpose = true", "transpose of a tensor that is skipped"),
    ] {
        let error = Rules::from_toml(&format!("rule = [{{ match = 'w', {rest} }}]")).unwrap_err();
        assert_eq!(error.rule(), Some("rules-file"), "{error}");
        assert!(error.message().starts_with("rule `w`: ") && error.to_string().contains(what), "{error}");
    }
}
