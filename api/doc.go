// Package api is the HTTP API of a server: the dialect of Nomad
// (https://developer.hashicorp.com/nomad/api-docs), spoken so that the unmodified
// nomad command line, Go client and Terraform provider work against it, and our
// own routes for models and artifacts. It also has the Go Client of those.
//
// A handler takes a request and returns a value or an error; one wrapper writes
// the answer, sets the headers, logs and counts. routes.go lists every route with
// its method and the capability that it asks for; errors.go alone knows HTTP
// statuses. What Nomad has and this version has not is answered by 501 and a
// sentence, never by an invented success.
//
// Reads follow Nomad's wire rules (https://developer.hashicorp.com/nomad/api-docs#blocking-queries):
// X-Nomad-Index is the last change of the tables or the object behind the answer,
// and a query with index=N waits until that number grows. A server that is not the
// leader answers reads from what it has applied so far.
package api
