//! What the fuzz targets found, by name.

use xent::{CrossEntropy, Input, Isa, Reduction, Results};

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// The slope of a cap under a scale past f32 was infinite, and took a gradient of 0 to NaN.
#[test]
fn certain_class_under_a_steep_cap() {
    for isa in isas() {
        for classes in [1, 2, 200] {
            let mut logits = vec![f32::NEG_INFINITY; classes];
            logits[0] = 0.0;
            let mut grad = vec![7.0f32; classes];
            let call = CrossEntropy::new(1, classes).softcap(30.0).logit_scale(f64::MAX).isa(isa);
            call.forward_backward(&logits, &[0i32], &mut grad).unwrap();
            if classes == 1 {
                assert_eq!(grad, [0.0], "{isa:?}");
            }
            // A class without any probability left is capped, and flat.
            assert!(grad[1..].iter().all(|g| *g == 0.0), "{isa:?}: {grad:?}");
        }
    }
}

/// A mean over a denominator of 0 is NaN, but not where a class has no weight: there is no term.
#[test]
fn weightless_classes_beside_no_denominator() {
    for isa in isas() {
        for classes in [3, 200] {
            let mut weights = vec![0.0f32; classes];
            weights[0] = 1.25;
            let logits = vec![-1.0f32; classes];
            let mut grad = vec![7.0f32; classes];
            CrossEntropy::new(1, classes)
                .log_probs(true)
                .label_smoothing(0.3)
                .class_weights(&weights)
                .isa(isa)
                .forward_backward(&logits, &[1i32], &mut grad)
                .unwrap();
            assert!(grad[0].is_infinite() || grad[0].is_nan(), "{isa:?}: {grad:?}");
            assert!(grad[2..].iter().all(|g| *g == 0.0), "{isa:?}: {grad:?}");
        }
    }
}

/// Smoothing adds up all classes before it divides by their number: beyond f64 that is infinite,
/// as semantics.md has it, and not NaN; and the gradient does not mind.
#[test]
fn lowest_numbers_for_a_mask_under_smoothing() {
    for isa in isas() {
        for classes in [3, 200] {
            let mut logits = vec![f64::MIN; classes];
            logits[0] = 0.0;
            for (log_probs, own) in [(false, 0.1), (true, -0.9)] {
                let mut grad = vec![7.0; classes];
                let call = CrossEntropy::new(1, classes).log_probs(log_probs).isa(isa);
                let sure = call.clone().forward(&logits, &[0i32]).unwrap();
                assert_eq!(sure, 0.0, "{isa:?}");
                let smooth = call.label_smoothing(0.1);
                let loss = smooth.forward_backward(&logits, &[0i32], &mut grad).unwrap();
                assert_eq!(loss, f64::INFINITY, "{isa:?}");
                let each = 0.1 / classes as f64;
                assert!((grad[0] - (own - each)).abs() < 1e-15, "{isa:?}: {}", grad[0]);
                assert!(grad[1..].iter().all(|g| (g + each).abs() < 1e-17), "{isa:?}: {grad:?}");
            }
        }
    }
}

/// An infinite mass: semantics.md leaves open which of NaN and infinity comes of it, but not where.
#[test]
fn infinite_masses_stay_in_their_row() {
    for isa in isas() {
        for classes in [3, 200] {
            let logits = vec![0.5f32; 2 * classes];
            let mut targets = vec![1.0 / classes as f32; 2 * classes];
            targets[classes + 1] = f32::NEG_INFINITY;
            let mut grad = vec![7.0f32; 2 * classes];
            let mut row_losses = [7.0f64; 2];
            let results =
                Results { row_losses: Some((&mut row_losses).into()), ..Results::default() };
            CrossEntropy::new(2, classes)
                .isa(isa)
                .reduction(Reduction::Sum)
                .forward_backward_with(&logits, &targets, &mut grad, results)
                .unwrap();
            assert!((row_losses[0] - (classes as f64).ln()).abs() < 1e-6, "{isa:?}");
            assert!(!row_losses[1].is_finite(), "{isa:?}: {row_losses:?}");
            let (first, second) = grad.split_at(classes);
            assert!(first.iter().all(|g| g.abs() < 1e-6), "{isa:?}: {first:?}");
            assert!(second.iter().all(|g| !g.is_finite()), "{isa:?}: {second:?}");
        }
    }
}

/// Equal terms round alike: 346 of them beside one that is larger by far, in lanes of f32.
#[test]
fn equal_terms_beside_one() {
    for isa in isas() {
        for classes in [384, 1000, 3000] {
            for low in [-7.0f32, -6.9, -7.3, -8.1] {
                let mut logits = vec![low; classes];
                logits[0] = 0.0;
                logits[248] = -5.375;
                logits[classes - 1] = -13.5;
                let mut lse = [0.0];
                CrossEntropy::new(1, classes).isa(isa).lse(&logits, &mut lse).unwrap();
                let want = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                let bound = 2e-7 * want + 2f64.powi(-23);
                let off = (lse[0] - want).abs();
                assert!(off <= bound, "{isa:?} {classes} {low}: {} not {want}, by {off:e}", lse[0]);
            }
        }
    }
}

/// Every way to the gradient with respect to the logits: from lse, and then fused, in place, of
/// probabilities, and with classes that are not contiguous.
fn gradients(call: &CrossEntropy, logits: &[f64], target: usize) -> Vec<Vec<f64>> {
    let (n, targets) = (logits.len(), [target as i64]);
    let mut all = Vec::new();
    let mut lse = [0.0];
    call.lse(logits, &mut lse).unwrap();
    let mut backward = vec![7.0; n];
    call.backward(logits, &targets, &lse, &mut backward).unwrap();
    all.push(backward);
    let mut fused = vec![7.0; n];
    call.forward_backward(logits, &targets, &mut fused).unwrap();
    all.push(fused);
    let mut over = logits.to_vec();
    call.forward_backward_in_place(&mut over, &targets).unwrap();
    all.push(over);
    let mut one_hot = vec![0.0; n];
    one_hot[target] = 1.0;
    let mut of_masses = vec![7.0; n];
    call.forward_backward(logits, &one_hot, &mut of_masses).unwrap();
    all.push(of_masses);
    let apart: Vec<f64> = logits.iter().flat_map(|&x| [x, 0.0]).collect();
    let apart = Input::from(&apart[..]).strides([0, 2, 0]);
    let mut tile = vec![7.0; n];
    call.forward_backward(apart, &targets, &mut tile).unwrap();
    all.push(tile);
    all
}

/// A z-loss whose slope is beyond f64 took classes without probability to NaN, the target's first
/// of all. They have none of it; and where a gradient is in range, so it is.
#[test]
fn penalty_beyond_f64() {
    for isa in isas() {
        for classes in [4, 200] {
            let mut logits = vec![f64::NEG_INFINITY; classes];
            (logits[0], logits[1], logits[3]) = (1e305, 1e305, -1e305);
            let call = CrossEntropy::new(1, classes).z_loss(2.0).grad_scale(1e30).isa(isa);
            for grad in gradients(&call, &logits, 3) {
                assert_eq!(grad[..2], [f64::INFINITY; 2], "{isa:?} {classes}");
                assert!((grad[3] + 1e30).abs() < 1e20, "{isa:?} {classes}: {}", grad[3]);
                assert!(grad[4..].iter().all(|g| *g == 0.0), "{isa:?}: {grad:?}");
                assert_eq!(grad[2], 0.0, "{isa:?} {classes}");
            }
        }
        // 4e310 is not in range, an equal share of it is.
        for classes in [400, 4000] {
            let call = CrossEntropy::new(1, classes).z_loss(2.0).grad_scale(1e5).isa(isa);
            let want = 1e308 * (400.0 / classes as f64);
            // (An lse of 1e305 does not say how many classes it is of.)
            for grad in &gradients(&call, &vec![1e305; classes], 3)[1..] {
                assert!(
                    grad.iter().all(|g| (g / want - 1.0).abs() < 1e-12),
                    "{isa:?}: {}",
                    grad[0]
                );
            }
        }
    }
}

/// The product of the factors left f64, though a small probability or denominator brings it back.
#[test]
fn factors_beyond_f64() {
    for isa in isas() {
        for classes in [3, 200] {
            let mut logits = vec![f64::NEG_INFINITY; classes];
            (logits[0], logits[1]) = (3.0, 0.0);
            let rest = (-3f64).exp();
            let p = rest / (1.0 + rest);
            for (normalizer, want) in
                [(0.0, p * f64::MAX), (0.1, p * 10.0 * f64::MAX), (5e-324, f64::INFINITY)]
            {
                let call =
                    CrossEntropy::new(1, classes).grad_scale(f64::MAX).normalizer(normalizer);
                for grad in gradients(&call.isa(isa), &logits, 0) {
                    let good = |g: f64| g == want || (g / want - 1.0).abs() < 1e-12;
                    assert!(good(-grad[0]) && good(grad[1]), "{isa:?}: {grad:?} not {want:e}");
                    assert!(grad[2..].iter().all(|g| *g == 0.0), "{isa:?}: {grad:?}");
                }
            }
        }
    }
}

/// A scale of 1e300 under a cap makes slopes that lanes of f32 do not hold, and a small factor of
/// the gradient brings them back.
#[test]
fn slopes_beyond_f32() {
    for isa in isas() {
        for classes in [2, 200] {
            let logits = vec![0.0f32; classes];
            let mut grad = vec![7.0f32; classes];
            CrossEntropy::new(1, classes)
                .softcap(30.0)
                .logit_scale(1e300)
                .grad_scale(1e-300)
                .isa(isa)
                .forward_backward(&logits, &[1i32], &mut grad)
                .unwrap();
            let p = 1.0 / classes as f32;
            assert!((grad[0] - p).abs() < 1e-6 * p, "{isa:?}: {grad:?}");
            assert!((grad[1] - (p - 1.0)).abs() < 1e-6, "{isa:?}: {grad:?}");
        }
    }
}

/// lse² left f64, and a λ next to nothing brings it back.
#[test]
fn square_of_lse_beyond_f64() {
    for isa in isas() {
        let call = CrossEntropy::new(1, 3).z_loss(5e-324).isa(isa);
        let loss = call.forward(&[1e200, 0.0, -1e200], &[0i32]).unwrap();
        assert!((loss / 4.940656458412465e76 - 1.0).abs() < 1e-10, "{isa:?}: {loss:e}");
    }
}
