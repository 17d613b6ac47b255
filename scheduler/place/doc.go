// Package place decides where work goes: it compares what a job asks for with
// what the cluster has and gives a Plan, together with the reasons for what it
// could not place. It is pure: no clock, randomness, goroutine, I/O or logger.
// The same View, evaluation, time and IDs give the same plan.
//
// Three steps, one file each. reconcile.go says what each group has too many of,
// lacks or must change; feasible.go says which nodes could take an allocation and
// what is in the way on the others; score.go chooses among them, with affinity.go for
// what the job would rather have and property.go for what depends on where the rest of
// it is. plan.go puts them together and writes the answer on the evaluation.
//
// The behaviour follows Nomad's documentation of the job specification
// (https://developer.hashicorp.com/nomad/docs/job-specification) and of scheduling
// (https://developer.hashicorp.com/nomad/docs/concepts/scheduling).
package place
