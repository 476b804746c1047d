/* The second unit of tests/c/header.c: xent.h and nothing else. */
/* Programs define x and y, and other letters. */
#define A [one-letter macro]
#define B [one-letter macro]
#define C [one-letter macro]
#define D [one-letter macro]
#define E [one-letter macro]
#define F [one-letter macro]
#define G [one-letter macro]
#define H [one-letter macro]
#define I [one-letter macro]
#define J [one-letter macro]
#define K [one-letter macro]
#define L [one-letter macro]
#define M [one-letter macro]
#define N [one-letter macro]
#define O [one-letter macro]
#define P [one-letter macro]
#define Q [one-letter macro]
#define R [one-letter macro]
#define S [one-letter macro]
#define T [one-letter macro]
#define U [one-letter macro]
#define V [one-letter macro]
#define W [one-letter macro]
#define X [one-letter macro]
#define Y [one-letter macro]
#define Z [one-letter macro]
#define a [one-letter macro]
#define b [one-letter macro]
#define c [one-letter macro]
#define d [one-letter macro]
#define e [one-letter macro]
#define f [one-letter macro]
#define g [one-letter macro]
#define h [one-letter macro]
#define i [one-letter macro]
#define j [one-letter macro]
#define k [one-letter macro]
#define l [one-letter macro]
#define m [one-letter macro]
#define n [one-letter macro]
#define o [one-letter macro]
#define p [one-letter macro]
#define q [one-letter macro]
#define r [one-letter macro]
#define s [one-letter macro]
#define t [one-letter macro]
#define u [one-letter macro]
#define v [one-letter macro]
#define w [one-letter macro]
#define x [one-letter macro]
#define y [one-letter macro]
#define z [one-letter macro]
#include "xent.h"
#undef A
#undef B
#undef C
#undef D
#undef E
#undef F
#undef G
#undef H
#undef I
#undef J
#undef K
#undef L
#undef M
#undef N
#undef O
#undef P
#undef Q
#undef R
#undef S
#undef T
#undef U
#undef V
#undef W
#undef X
#undef Y
#undef Z
#undef a
#undef b
#undef c
#undef d
#undef e
#undef f
#undef g
#undef h
#undef i
#undef j
#undef k
#undef l
#undef m
#undef n
#undef o
#undef p
#undef q
#undef r
#undef s
#undef t
#undef u
#undef v
#undef w
#undef x
#undef y
#undef z

xent_problem problem_from_the_other_unit(void);
xent_status forward_from_the_other_unit(const xent_problem *problem, const xent_results *results);

xent_problem problem_from_the_other_unit(void) {
    static const xent_problem problem = XENT_PROBLEM_INIT;
    return problem;
}

xent_status forward_from_the_other_unit(const xent_problem *problem, const xent_results *results) {
    return xent_forward(problem, results);
}
