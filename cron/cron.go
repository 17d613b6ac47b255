// Package cron tells when cron expressions are due, in a time zone: the times of periodic
// jobs. The expressions are those of Nomad's periodic block
// (https://developer.hashicorp.com/nomad/docs/job-specification/periodic): five to seven
// fields, or a name like @daily.
//
// A time that a zone leaves out when its clocks go forward does not come; one that it has
// twice when they go back comes twice.
package cron

import (
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/cronexpr"
)

// Schedule is the times that any of some expressions names. It is for one goroutine at a time.
type Schedule struct {
	zone  *time.Location
	exprs []*cronexpr.Expression
}

// Zone finds a time zone by its name in the IANA database; "" is UTC. The zone of the machine
// is none: servers may differ in it.
func Zone(name string) (*time.Location, error) {
	if name == "" {
		return time.UTC, nil
	}
	if name == time.Local.String() {
		return nil, fmt.Errorf("time zone %q may differ between servers: name one like Europe/Berlin", name)
	}
	zone, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("unknown time zone %q: name one like Europe/Berlin", name)
	}
	return zone, nil
}

// beginning is when every expression is looked at whether its times ever come.
var beginning = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// Parse makes a schedule of expressions in a zone; the error names each that is none, and each
// of which the times never come.
func Parse(zone string, exprs ...string) (*Schedule, error) {
	loc, err := Zone(zone)
	s := &Schedule{zone: loc}
	faults := []error{err}
	for _, text := range exprs {
		expr, err := parse(text)
		if err == nil && next(expr, beginning).IsZero() {
			err = errors.New("names a time that never comes")
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("cron expression %q: %w", text, err))
		}
		s.exprs = append(s.exprs, expr)
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	return s, nil
}

// Next is the first time after t, told in the schedule's zone; the zero time when none is left.
func (s *Schedule) Next(t time.Time) (first time.Time) {
	for _, expr := range s.exprs {
		if due := next(expr, t.In(s.zone)); first.IsZero() || !due.IsZero() && due.Before(first) {
			first = due
		}
	}
	return first
}

// parse makes an error of what the library panics with.
func parse(text string) (expr *cronexpr.Expression, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = errors.New("cannot be read")
		}
	}()
	return cronexpr.Parse(text)
}

// maxStuck bounds the hours by which next helps the library on.
const maxStuck = 48

// next is the first time after t. Around some changes of a zone's clocks the library gives t again:
// it goes on from an hour later then. Where it panics, none is left.
func next(expr *cronexpr.Expression, t time.Time) (due time.Time) {
	defer func() {
		if recover() != nil {
			due = time.Time{}
		}
	}()
	for hours := range time.Duration(maxStuck) {
		if due = expr.Next(t.Add(hours * time.Hour)); due.IsZero() || due.After(t) {
			return due
		}
	}
	return time.Time{}
}
