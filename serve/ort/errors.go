package ort

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/rxvision/rxvision/oip"
)

// What can be wrong with a model file. Open and Inspect wrap these in one sentence.
var (
	ErrNotModel    = errors.New("not an ONNX model")
	ErrTruncated   = errors.New("truncated ONNX model")
	ErrOperator    = errors.New("ONNX Runtime has no such operator")
	ErrVersion     = errors.New("the model is newer than ONNX Runtime")
	ErrUnsupported = errors.New("which the inference protocol cannot carry")
)

// runtimeError is a status of ONNX Runtime.
type runtimeError struct {
	code int // OrtErrorCode
	text string
}

func (e *runtimeError) Error() string { return oneLine(e.text) }

const invalidArgument = 2 // OrtErrorCode

var (
	unknownOperator = regexp.MustCompile(`(\S+)\(-?\d+\) is not a registered function/op|No Op registered for (\S+) with domain_version`)
	noKernel        = regexp.MustCompile(`Could not find an implementation for (\S+?)\((-?\d+)\) node`)
	newOpset        = regexp.MustCompile(`Opset (\d+) is under development.*support for domain (\S+) is till opset (\d+)`)
	newIR           = regexp.MustCompile(`Unsupported model IR version: (\d+), max supported IR version: (\d+)`)
	badProtobuf     = regexp.MustCompile(`(?i)protobuf parsing failed`)
)

// loadError says in a sentence of ours why a model could not be opened, where the reason is one that we know.
func loadError(err error) error {
	var e *runtimeError
	if !errors.As(err, &e) {
		return err
	}
	text := strings.Join(strings.Fields(e.text), " ")
	if m := unknownOperator.FindStringSubmatch(text); m != nil {
		return fmt.Errorf("operator %s: %w (version %s)", m[1]+m[2], ErrOperator, Version())
	}
	if m := noKernel.FindStringSubmatch(text); m != nil {
		return fmt.Errorf("operator %s of opset %s: %w for these types on this device (version %s)",
			m[1], m[2], ErrOperator, Version())
	}
	if m := newOpset.FindStringSubmatch(text); m != nil {
		return fmt.Errorf("%w %s: it needs opset %s of %s, which goes up to %s", ErrVersion, Version(), m[1], m[2], m[3])
	}
	if m := newIR.FindStringSubmatch(text); m != nil {
		return fmt.Errorf("%w %s: it has IR version %s, the newest known is %s", ErrVersion, Version(), m[1], m[2])
	}
	if badProtobuf.MatchString(text) {
		return fmt.Errorf("%w: its protobuf cannot be parsed", ErrNotModel)
	}
	return e
}

// runError classifies what a run returned: what ONNX Runtime holds against its arguments is the caller's fault.
func runError(err error) error {
	var e *runtimeError
	if !errors.As(err, &e) {
		return err
	}
	if e.code == invalidArgument {
		return oip.Errorf(http.StatusBadRequest, "run model: %s", e)
	}
	return fmt.Errorf("run model: %w", e)
}

var (
	ansi   = regexp.MustCompile("\x1b\\[[0-9;]*[A-Za-z]")
	prefix = regexp.MustCompile(`^Load model from .*? failed: ?`)
	source = regexp.MustCompile(`\S*/onnxruntime/\S+:\d+ (?:.*?\)(?: const)? )?`) // "/path/file.cc:12 type function(args) "
)

const maxMessage = 300

// oneLine makes a short plain line of a message of ONNX Runtime: no colours, source positions or line breaks.
func oneLine(text string) string {
	text = ansi.ReplaceAllString(text, "")
	text = prefix.ReplaceAllString(text, "")
	text = source.ReplaceAllString(text, "")
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxMessage {
		cut := maxMessage
		for !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut] + "…"
	}
	return text
}
