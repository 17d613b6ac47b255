// Command rxvision is the whole platform in one binary: server, agent, worker,
// gateway, dev (all of them on one machine) and the commands of its users.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/proc"
)

// Exit codes that scripts may rely on.
const (
	exitOK       = 0
	exitError    = 1 // the command failed; one sentence on stderr says why
	exitUnplaced = 2 // job run: the job is registered, but not all of it could be placed
	exitInvalid  = 3 // worker --check: the file is no model that can be served
)

// exitCode is an error that has been reported already and only sets the code.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func main() {
	proc.Main() // in a task's supervisor this does the work and never returns
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) && !reloads(os.Args) { // ignored under nohup
		signals = append(signals, syscall.SIGHUP) // the terminal was closed
	}
	ctx, stop := endBy(signals...)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// stopSignal is the cause of a context that a signal has ended.
type stopSignal struct{ os.Signal }

func (s stopSignal) Error() string { return s.String() + " received" }

// Is makes it pass for the end of any context: whoever ends by it has not failed.
func (s stopSignal) Is(target error) bool { return target == context.Canceled }

// endBy gives a context that ends at the first of the signals, with a stopSignal as
// its cause.
func endBy(signals ...os.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, signals...)
	go func() {
		select {
		case s := <-caught:
			cancel(stopSignal{s})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(caught)
		cancel(nil)
	}
}

// reloads says whether the command takes SIGHUP as the word to reload.
func reloads(args []string) bool {
	return len(args) > 1 && slices.Contains([]string{"server", "agent", "gateway"}, args[1])
}

// run executes one command line and gives the exit code; tests call it too.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := newRoot()
	args = doubleDashes(root, args)
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagFaults(args, err) })
	err := root.ExecuteContext(ctx)
	var code exitCode
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &code):
		return int(code)
	}
	fmt.Fprintf(errOut, "rxvision: %v\n", err)
	return exitError
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "rxvision",
		Short: "The GPU platform for everyone on the HashiCorp stack",
		Long: `rxvision assigns inference and training work to the nodes that own the GPUs.
Work is written as Nomad job specs; ` + "`nomad`" + ` itself drives it too (NOMAD_ADDR).

Every flag can be set by an environment variable: --http-addr is RXVISION_HTTP_ADDR;
for server, agent and gateway also in a file (--config): http_addr, or addr in a block http.
A flag may be written with one dash or two.

Exit codes: 0 done; 1 failed, with the reason on stderr; 2 a job is registered but
could not be placed whole; 3 a checked file is no model that can be served.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return loadSettings(cmd) },
	}
	root.AddCommand(
		newDev(), newServer(), newAgent(), newGateway(), newWorker(),
		newJob(), newModel(), newNode(), newSnapshot(), newTLS(), newInfer(), newBench(), newSim(), newVersion(),
	)
	return root
}
