// Package task runs the tasks of an allocation on this node: it lays out their
// directories, builds their environment, fetches their artifacts, renders their
// templates, and starts them through a Driver.
//
// Drivers carry the names and config keys of Nomad's
// (https://developer.hashicorp.com/nomad/docs/drivers):
//
//   - raw_exec runs any command as the agent's user (or Task.User), without
//     isolation; it is off unless the operator enables it;
//   - exec runs a command in namespaces of its own, as nobody, where the host can
//     do that, and reports why not where it cannot;
//   - onnx serves a model: it fetches the artifact by digest and starts a worker
//     process for it.
//
// Every task is a process tree of package proc that outlives the agent. A
// Handle's State is all that a later agent needs to take it over again.
//
// # What a task sees
//
// Of the agent's own environment only a few harmless variables (PATH, HOME, LANG…)
// reach a task; the rest is Nomad's NOMAD_… set, the job's own variables, and the
// devices it was given. A task without a device is told that there is none, so
// that a CUDA program does not help itself to its neighbours' GPUs. Those
// variables are a convention of the libraries, not a wall: under raw_exec a task
// may ignore them, as under Nomad.
package task
