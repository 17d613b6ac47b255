package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/rxvision/rxvision/cluster"
)

// statuses maps codes to HTTP statuses. Nomad answers 500 to much that others
// would call 409: a conflict of its dialect is wrapped by conflict.
var statuses = map[cluster.Code]int{
	cluster.CodeInvalid:      http.StatusBadRequest,
	cluster.CodeNotFound:     http.StatusNotFound,
	cluster.CodeConflict:     http.StatusConflict,
	cluster.CodeUnknownModel: http.StatusUnprocessableEntity,
	cluster.CodeNoLeader:     http.StatusInternalServerError,
	cluster.CodeUnavailable:  http.StatusServiceUnavailable,
	cluster.CodeTooLarge:     http.StatusRequestEntityTooLarge,
	cluster.CodeForbidden:    http.StatusForbidden,
	cluster.CodeUnsupported:  http.StatusNotImplemented,
	cluster.CodeInternal:     http.StatusInternalServerError,
}

// codeHeader carries the code beside the status, so that a Client gets back the
// very error that the server had.
const codeHeader = "X-Rxvision-Code"

// statusError is an error with a status of its own.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// statusOf gives the HTTP status of an error.
func statusOf(err error) int {
	var s *statusError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &s):
		return s.status
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge
	}
	return statuses[cluster.CodeOf(err)]
}

// codeOf is the reverse of statusOf for answers without codeHeader.
func codeOf(status int) cluster.Code {
	if status != http.StatusInternalServerError { // two codes have it
		for code, s := range statuses {
			if s == status {
				return code
			}
		}
	}
	return cluster.CodeInternal
}

// gone says whether the client went away, so that there is nobody to answer.
func gone(r *http.Request, err error) bool {
	return errors.Is(err, context.Canceled) && r.Context().Err() != nil
}

func badRequest(format string, args ...any) error {
	return cluster.Errorf(cluster.CodeInvalid, format, args...)
}

func notFound(format string, args ...any) error {
	return cluster.Errorf(cluster.CodeNotFound, format, args...)
}

func notBuilt(format string, args ...any) error {
	return cluster.Errorf(cluster.CodeUnsupported, format, args...)
}

// refused gives an error the status 500, which Nomad has for requests that its
// servers understood and would not do: invalid jobs, conflicts, ended deployments.
func refused(err error) error {
	switch cluster.CodeOf(err) {
	case cluster.CodeInvalid, cluster.CodeConflict, cluster.CodeUnknownModel, cluster.CodeNotFound:
		return &statusError{http.StatusInternalServerError, err}
	}
	return err
}

func refusedf(format string, args ...any) error {
	return refused(cluster.Errorf(cluster.CodeConflict, format, args...))
}

// errRange refuses a byte range behind the end.
func errRange(size int64) error {
	return &statusError{http.StatusRequestedRangeNotSatisfiable, cluster.Errorf(cluster.CodeInvalid, "the artifact has %d bytes", size)}
}

var (
	errMethod   = &statusError{http.StatusMethodNotAllowed, cluster.Errorf(cluster.CodeInvalid, "Invalid method")}
	errBlocking = &statusError{http.StatusTooManyRequests, fmt.Errorf("%d blocking queries are under way on this server, which is its limit: try again", MaxBlocking)}
	errNoACL    = badRequest("ACL support disabled")
	errRegion   = &statusError{http.StatusInternalServerError, cluster.Errorf(cluster.CodeNotFound, "No path to region")}
	errEmpty    = badRequest("Request body is empty")
	errEnt      = notBuilt("Nomad Enterprise only endpoint")
)
