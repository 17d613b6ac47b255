package agent

import (
	"fmt"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

// Types of task events as Nomad names them.
const (
	eventReceived       = "Received"
	eventSetup          = "Task Setup"
	eventSetupFailure   = "Setup Failure"
	eventDownloading    = "Downloading Artifacts"
	eventDownloadFailed = "Failed Artifact Download"
	eventStarted        = "Started"
	eventDriver         = "Driver"
	eventDriverFailure  = "Driver Failure"
	eventTerminated     = "Terminated"
	eventRestarting     = "Restarting"
	eventNotRestarting  = "Not Restarting"
	eventRestartSignal  = "Restart Signaled"
	eventSignaling      = "Signaling"
	eventKilling        = "Killing"
	eventKilled         = "Killed"
	eventSiblingFailed  = "Sibling Task Failed"
	eventLeaderDead     = "Leader Task Dead"
	eventMainDead       = "Main Tasks Dead"
	eventShutdownDelay  = "Waiting for shutdown delay"
	eventUnhealthy      = "Alloc Unhealthy"
	eventDevice         = "Device Unhealthy" // ours
)

func event(kind, display string, details ...string) *cluster.TaskEvent {
	e := &cluster.TaskEvent{Type: kind, Time: time.Now().UnixNano(), DisplayMessage: display, Details: map[string]string{}}
	for i := 0; i+1 < len(details); i += 2 {
		e.Details[details[i]] = details[i+1]
	}
	return e
}

// messageEvent is an event that carries a text of its own.
func messageEvent(kind, text string) *cluster.TaskEvent {
	e := event(kind, text, "message", text)
	e.Message = text
	return e
}

// failureEvent is an event that carries an error.
func failureEvent(kind, key string, err error) *cluster.TaskEvent {
	e := event(kind, err.Error(), key, err.Error())
	e.Message = err.Error()
	return e
}

// terminatedEvent says how a run ended. who begins the sentence about a signal or
// a loss: "worker", "task". crash explains what the exit code does not, or is "".
func terminatedEvent(who string, exit task.Exit, crash string) *cluster.TaskEvent {
	text := fmt.Sprintf("Exit Code: %d", exit.Code)
	if exit.Signal != 0 {
		text += fmt.Sprintf(", Signal: %d", exit.Signal)
	}
	e := event(eventTerminated, "", "exit_code", strconv.Itoa(exit.Code), "signal", strconv.Itoa(exit.Signal),
		"oom_killed", strconv.FormatBool(exit.OOMKilled))
	e.ExitCode, e.Signal = exit.Code, exit.Signal
	if !exit.Finished.IsZero() {
		e.Time = exit.Finished.UnixNano()
	}
	reason := exitReason(who, exit)
	if reason == "" {
		reason = crash
	}
	if reason != "" {
		e.Message, e.Details["exit_message"] = reason, reason
		text += fmt.Sprintf(", Exit Message: %q", reason)
	}
	e.DisplayMessage = text
	return e
}

// exitReason explains an end that its code alone does not.
func exitReason(who string, exit task.Exit) string {
	switch {
	case exit.Lost:
		return who + " was lost: its supervisor was killed or the machine was restarted"
	case exit.OOMKilled:
		return who + " was killed for exceeding its memory limit"
	case exit.Signal != 0:
		return fmt.Sprintf("%s ended by signal %d (%s)", who, exit.Signal, signalWords(syscall.Signal(exit.Signal)))
	}
	return ""
}

func signalWords(s syscall.Signal) string {
	if s == unix.SIGSEGV {
		return "segmentation fault" // Linux calls SIGSEGV a violation, everybody else a fault
	}
	return s.String()
}

func restartingEvent(v verdict) *cluster.TaskEvent {
	return event(eventRestarting, "Task restarting in "+v.delay.Round(time.Millisecond).String(),
		"restart_reason", v.reason, "start_delay", strconv.FormatInt(int64(v.delay), 10))
}

func notRestartingEvent(v verdict) *cluster.TaskEvent {
	e := event(eventNotRestarting, v.reason, "restart_reason", v.reason, "fails_task", strconv.FormatBool(v.failed))
	e.FailsTask = v.failed
	return e
}

func killingEvent(sig syscall.Signal, grace time.Duration, reason string) *cluster.TaskEvent {
	name := "interrupt"
	if sig != syscall.SIGINT {
		name = unix.SignalName(sig)
	}
	e := event(eventKilling, fmt.Sprintf("Sent %s. Waiting %s before force killing", name, grace), "kill_timeout", grace.String())
	if reason != "" {
		e.Details["kill_reason"] = reason
	}
	return e
}

// addEvent appends an event and drops the oldest beyond the bound.
func addEvent(s *cluster.TaskState, e *cluster.TaskEvent) {
	if n := len(s.Events) + 1 - cluster.MaxTaskEvents; n > 0 {
		s.Events = append(s.Events[:0:0], s.Events[n:]...)
	}
	s.Events = append(s.Events, e)
}
