// Package gateway is the inference front door: it takes Open Inference Protocol
// requests and images, finds a healthy replica of the model and answers, while
// replicas come and go.
//
// Routes come from any server by a watch and are kept on disk, so that a gateway
// goes on, and starts, with all servers down. The servers are never on the path
// of an inference.
package gateway
