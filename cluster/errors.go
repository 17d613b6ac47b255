package cluster

import (
	"errors"
	"fmt"
)

// Code classifies an error so that it keeps its meaning across the log, the
// wire and HTTP. Package api alone maps codes to HTTP statuses.
type Code string

// The codes.
const (
	CodeInvalid      Code = "invalid"       // the request is wrong
	CodeNotFound     Code = "not-found"     // what it names does not exist
	CodeConflict     Code = "conflict"      // a check-and-set failed, or it exists already
	CodeUnknownModel Code = "unknown-model" // a job names a model that is not registered
	CodeNoLeader     Code = "no-leader"     // nobody can take the write now
	CodeUnavailable  Code = "unavailable"   // a part that is needed is not there now
	CodeTooLarge     Code = "too-large"     // over a limit
	CodeForbidden    Code = "forbidden"
	CodeUnsupported  Code = "unsupported" // asked for something that is not built
	CodeInternal     Code = "internal"
)

// Error is an error with a Code. Text is one clear sentence for the user.
type Error struct {
	Code Code
	Text string
}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Is makes errors.Is(err, &Error{Code: c}) match by code when the target has no text.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && (t.Text == "" || t.Text == e.Text)
}

// Errorf makes an Error.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Text: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of the first Error in err's chain, CodeInternal for
// other errors and "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

// ErrNoLeader is returned by writes and consistent reads while there is no leader.
var ErrNoLeader = &Error{Code: CodeNoLeader, Text: "No cluster leader"}
