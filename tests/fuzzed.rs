//! What the fuzz targets found, by name.

use xent::{CrossEntropy, Isa, Reduction, Results};

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
