//! Where mutants go: what a parser finds, and the list made by hand.

use super::{SOURCES, Site};
use crate::tool::{Result, root};
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{BinOp, Expr, UnOp};

/// Every site of every file, in order.
pub fn by_parser(texts: &BTreeMap<&'static str, String>) -> Result<Vec<Site>> {
    let mut sites = Vec::new();
    for file in SOURCES {
        let text = &texts[file];
        let parsed = syn::parse_file(text).map_err(|error| format!("{file}: {error}"))?;
        let mut finder = Finder {
            file,
            text,
            function: String::new(),
            around: 0,
            later: Vec::new(),
            sites: &mut sites,
        };
        finder.visit_file(&parsed);
    }
    number_equals(&mut sites);
    Ok(sites)
}

fn number(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// So that each has a name of its own: those of the same function and text are counted.
fn number_equals(sites: &mut [Site]) {
    let mut seen = BTreeMap::new();
    for site in sites {
        let count = seen.entry(site.name()).or_insert(0);
        *count += 1;
        if *count > 1 {
            site.what.push_str(&format!(" #{count}"));
        }
    }
}

/// Calls that may be made twice, and tell the same.
const PURE: [&str; 14] = [
    "len",
    "abs",
    "min",
    "max",
    "size",
    "size_of",
    "is_null",
    "addr",
    "is_some",
    "is_none",
    "saturating_mul",
    "div_ceil",
    "distributions",
    "trailing_zeros",
];

/// Whether it can be evaluated twice.
fn is_pure(expression: &Expr) -> bool {
    match expression {
        Expr::Path(_) | Expr::Lit(_) => true,
        Expr::Field(field) => is_pure(&field.base),
        Expr::Paren(inner) => is_pure(&inner.expr),
        Expr::Reference(inner) => is_pure(&inner.expr),
        Expr::Unary(unary) => is_pure(&unary.expr),
        Expr::Cast(cast) => is_pure(&cast.expr),
        Expr::Index(index) => is_pure(&index.expr) && is_pure(&index.index),
        Expr::Binary(binary) => is_pure(&binary.left) && is_pure(&binary.right),
        Expr::MethodCall(call) => {
            PURE.contains(&call.method.to_string().as_str())
                && is_pure(&call.receiver)
                && call.args.iter().all(is_pure)
        }
        Expr::Call(call) => match &*call.func {
            Expr::Path(path) => path
                .path
                .segments
                .last()
                .is_some_and(|last| PURE.contains(&last.ident.to_string().as_str())),
            _ => false,
        },
        _ => false,
    }
}

struct Finder<'a> {
    file: &'static str,
    text: &'a str,
    function: String,
    /// Of its text: see [`Site::around`].
    around: u64,
    /// Variables that are declared without a value: without their assignment nothing compiles.
    later: Vec<syn::Ident>,
    sites: &'a mut Vec<Site>,
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && attribute.meta.require_list().is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

/// A condition with `let` in it is no expression of its own.
fn has_let(expression: &Expr) -> bool {
    match expression {
        Expr::Let(_) => true,
        Expr::Binary(binary) => has_let(&binary.left) || has_let(&binary.right),
        _ => false,
    }
}

impl Finder<'_> {
    fn of(&self, node: &impl Spanned) -> &str {
        &self.text[node.span().byte_range()]
    }

    fn add(&mut self, node: &impl Spanned, replacement: String) {
        let range = node.span().byte_range();
        let mut shown = self.text[range.clone()].split_whitespace().collect::<Vec<_>>().join(" ");
        if shown.chars().count() > 70 {
            shown = shown.chars().take(67).chain("...".chars()).collect();
        }
        let new = replacement.split_whitespace().collect::<Vec<_>>().join(" ");
        let new = if new.chars().count() > 70 {
            new.chars().take(67).chain("...".chars()).collect()
        } else if new.is_empty() {
            "nothing".to_string()
        } else {
            new
        };
        self.sites.push(Site {
            file: self.file,
            start: range.start,
            end: range.end,
            replacement,
            line: node.span().start().line,
            what: format!("{}: {shown} -> {new}", self.function),
            by_hand: false,
            around: self.around,
            is_comparison: false,
        });
    }

    fn inside(&mut self, name: &syn::Ident, item: &impl Spanned, block: &syn::Block) {
        let outer = (self.function.clone(), self.around);
        (self.function, self.around) = (name.to_string(), number(self.of(item)));
        self.later.clear();
        self.visit_block(block);
        (self.function, self.around) = outer;
    }

    fn condition(&mut self, condition: &Expr) {
        let plain = matches!(
            condition,
            Expr::MethodCall(_) | Expr::Path(_) | Expr::Field(_) | Expr::Call(_) | Expr::Macro(_)
        );
        if plain {
            self.add(condition, format!("!({})", self.of(condition)));
        }
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) && item.sig.constness.is_none() {
            self.inside(&item.sig.ident, item, &item.block);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if item.sig.constness.is_none() {
            self.inside(&item.sig.ident, item, &item.block);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.inside(&item.sig.ident, item, block);
        }
    }

    // What is evaluated by the compiler, and what is no expression.
    fn visit_item_const(&mut self, _: &'ast syn::ItemConst) {}
    fn visit_item_static(&mut self, _: &'ast syn::ItemStatic) {}
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_trait_item_const(&mut self, _: &'ast syn::TraitItemConst) {}
    fn visit_expr_const(&mut self, _: &'ast syn::ExprConst) {}
    fn visit_type(&mut self, _: &'ast syn::Type) {}
    fn visit_pat(&mut self, _: &'ast syn::Pat) {}
    fn visit_generic_argument(&mut self, _: &'ast syn::GenericArgument) {}
    fn visit_expr_repeat(&mut self, repeat: &'ast syn::ExprRepeat) {
        self.visit_expr(&repeat.expr);
    }

    fn visit_expr_binary(&mut self, binary: &'ast syn::ExprBinary) {
        let new: &[&str] = match binary.op {
            BinOp::Add(_) => &["-"],
            BinOp::Sub(_) => &["+"],
            BinOp::Mul(_) => &["+"],
            BinOp::Div(_) => &["*"],
            BinOp::Rem(_) => &["/"],
            BinOp::And(_) => &["||"],
            BinOp::Or(_) => &["&&"],
            BinOp::BitAnd(_) => &["|"],
            BinOp::BitOr(_) => &["&"],
            BinOp::BitXor(_) => &["|"],
            BinOp::Shl(_) => &[">>"],
            BinOp::Shr(_) => &["<<"],
            BinOp::Eq(_) => &["!="],
            BinOp::Ne(_) => &["=="],
            BinOp::Lt(_) => &["<=", ">="],
            BinOp::Le(_) => &["<", ">"],
            BinOp::Gt(_) => &[">=", "<="],
            BinOp::Ge(_) => &[">", "<"],
            BinOp::AddAssign(_) => &["-="],
            BinOp::SubAssign(_) => &["+="],
            BinOp::MulAssign(_) => &["/="],
            BinOp::BitOrAssign(_) => &["&="],
            BinOp::BitAndAssign(_) => &["|="],
            _ => &[],
        };
        if !has_let(&binary.left) && !has_let(&binary.right) {
            for new in new {
                let (left, right) = (self.of(&binary.left), self.of(&binary.right));
                self.add(binary, format!("({left}) {new} ({right})"));
                let compares = ["<", "<=", ">", ">=", "==", "!="].contains(new);
                if compares && is_pure(&binary.left) && is_pure(&binary.right) {
                    self.sites.last_mut().expect("just added").is_comparison = true;
                }
            }
        }
        visit::visit_expr_binary(self, binary);
    }

    fn visit_expr_unary(&mut self, unary: &'ast syn::ExprUnary) {
        let is_literal = matches!(*unary.expr, Expr::Lit(_));
        if matches!(unary.op, UnOp::Not(_)) || matches!(unary.op, UnOp::Neg(_)) && !is_literal {
            self.add(unary, self.of(&unary.expr).to_string());
        }
        visit::visit_expr_unary(self, unary);
    }

    fn visit_expr_if(&mut self, expression: &'ast syn::ExprIf) {
        self.condition(&expression.cond);
        visit::visit_expr_if(self, expression);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let arguments: Vec<&str> = call.args.iter().map(|argument| self.of(argument)).collect();
        let receiver = self.of(&call.receiver);
        let name = call.method.to_string();
        let with =
            |name: &str, arguments: &[&str]| format!("{receiver}.{name}({})", arguments.join(", "));
        let new = match (name.as_str(), arguments.as_slice()) {
            // Of lanes.
            ("add", &[a, b]) => with("sub", &[a, b]),
            ("sub", &[a, b]) => with("add", &[a, b]),
            ("mul", &[a, b]) => with("add", &[a, b]),
            ("div", &[a, b]) => with("mul", &[a, b]),
            ("min", &[a, b]) => with("max", &[a, b]),
            ("max", &[a, b]) => with("min", &[a, b]),
            ("less", &[a, b]) => with("less", &[b, a]),
            ("equal", &[a, b]) => with("less", &[a, b]),
            ("select", &[mask, a, b]) => with("select", &[mask, b, a]),
            ("mul_add", &[a, b, _]) => with("mul", &[a, b]),
            ("mul_sub_exact", &[a, b, _]) => with("mul", &[a, b]),
            // Of numbers.
            ("min", &[x]) => with("max", &[x]),
            ("max", &[x]) => with("min", &[x]),
            ("abs", &[]) => receiver.to_string(),
            ("saturating_sub", &[x]) => with("saturating_add", &[x]),
            ("wrapping_add", &[x]) => with("wrapping_sub", &[x]),
            ("saturating_mul", &[x]) => with("saturating_add", &[x]),
            ("div_ceil", &[x]) => format!("({receiver}) / ({x})"),
            _ => String::new(),
        };
        if !new.is_empty() {
            self.add(call, new);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_local(&mut self, local: &'ast syn::Local) {
        match &local.pat {
            syn::Pat::Ident(name) if local.init.is_none() => self.later.push(name.ident.clone()),
            syn::Pat::Tuple(names) if local.init.is_none() => {
                for name in &names.elems {
                    if let syn::Pat::Ident(name) = name {
                        self.later.push(name.ident.clone());
                    }
                }
            }
            _ => {}
        }
        visit::visit_local(self, local);
    }

    fn visit_stmt(&mut self, statement: &'ast syn::Stmt) {
        if let syn::Stmt::Expr(
            expression @ (Expr::Call(_) | Expr::MethodCall(_) | Expr::Assign(_) | Expr::Binary(_)),
            Some(_),
        ) = statement
        {
            let is_first = match expression {
                Expr::Assign(assign) => match &*assign.left {
                    Expr::Path(path) => self.later.iter().any(|name| path.path.is_ident(name)),
                    _ => false,
                },
                _ => false,
            };
            if !is_first {
                self.add(statement, String::new());
            }
        }
        visit::visit_stmt(self, statement);
    }
}

/// `tests/mutants.txt`: blocks of
///
/// ```text
/// src/plan.rs: what is wrong with it
/// - text that is there exactly once
/// + what it becomes
/// ```
///
/// with as many lines of each as there are; an expression, or statements that end in `;`.
pub fn by_hand(texts: &BTreeMap<&'static str, String>) -> Result<Vec<Site>> {
    let path = root().join("tests/mutants.txt");
    let list = fs::read_to_string(&path).map_err(|error| format!("tests/mutants.txt: {error}"))?;
    let mut sites: Vec<Site> = Vec::new();
    let mut block: Option<(String, Vec<&str>, Vec<&str>)> = None;
    // All that no longer apply are named at once.
    let mut strays = Vec::new();
    let mut take = |block: Option<(String, Vec<&str>, Vec<&str>)>| -> Result {
        let Some((head, from, to)) = block else { return Ok(()) };
        let (file, what) = head.split_once(": ").ok_or(format!("no file in {head:?}"))?;
        let file = SOURCES
            .into_iter()
            .find(|source| *source == file)
            .ok_or(format!("{file} is not among the sources"))?;
        let (from, to) = (from.join("\n"), to.join("\n"));
        let text = &texts[file];
        let places: Vec<usize> = text.match_indices(&from).map(|(at, _)| at).collect();
        let [start] = places[..] else {
            strays.push(format!("{file} has {} times {from:?} ({what})", places.len()));
            return Ok(());
        };
        sites.push(Site {
            file,
            start,
            end: start + from.len(),
            replacement: to,
            line: text[..start].lines().count(),
            what: what.to_string(),
            by_hand: true,
            around: number(text),
            is_comparison: false,
        });
        Ok(())
    };
    for line in list.lines() {
        if let Some(from) = line.strip_prefix("- ") {
            block.as_mut().ok_or("a - without a head")?.1.push(from);
        } else if line == "+" || line.starts_with("+ ") {
            let to = line.get(2..).unwrap_or_default();
            block.as_mut().ok_or("a + without a head")?.2.push(to);
        } else if !line.is_empty() && !line.starts_with('#') {
            take(block.take())?;
            block = Some((line.to_string(), Vec::new(), Vec::new()));
        }
    }
    take(block)?;
    if strays.is_empty() { Ok(sites) } else { Err(strays.join("\n")) }
}

/// Leaves out what the parser found across the border of another.
pub fn without_crossings(sites: &mut Vec<Site>) {
    let all = sites.clone();
    sites.retain(|site| {
        let crosses = |other: &Site| {
            other.file == site.file
                && other.start < site.end
                && site.start < other.end
                && !(other.start <= site.start && site.end <= other.end)
                && !(site.start <= other.start && other.end <= site.end)
        };
        site.by_hand || !all.iter().any(|other| other.by_hand && crosses(other))
    });
}
