// Package jobspec turns what a user submits, a job in HCL or JSON, into the
// cluster.Job that the state keeps, or says everything that is wrong with it at
// once, by path and line. It also tells how two versions of a job differ.
//
//	Parse    text → *api.Job, with the line of every block and attribute
//	FromAPI  *api.Job → *cluster.Job: defaults filled in, all of it checked
//	Annotate adds lines to faults from the source that came along with a job
//	Diff     two cluster.Jobs → the tree that `nomad job plan` prints
//
// The dialect is Nomad's (its job specification pages); HCL is read by Nomad's
// own parser, github.com/hashicorp/nomad/jobspec2. Nothing that a job says is
// dropped in silence: a block or field that this version does not act on is a
// fault that says so (the table in honoured.go).
//
// Parse evaluates the user's HCL expressions. It bounds the size and the nesting
// of the source, not what the expressions compute; a server that parses for
// others must therefore ask for a capability first. Annotate and FromAPI evaluate
// nothing and are safe on any input.
package jobspec
