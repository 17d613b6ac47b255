package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Default addresses; dev and the single processes share them.
const (
	defaultHTTPAddr    = "127.0.0.1:7646"
	defaultRPCAddr     = "127.0.0.1:7647"
	defaultRaftAddr    = "127.0.0.1:7648"
	defaultAgentAddr   = "127.0.0.1:7656"
	defaultGatewayAddr = "127.0.0.1:8080"
	defaultDataDir     = "rxvision-data"
)

// envName is the variable that sets a flag.
func envName(flag string) string {
	return "RXVISION_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// flagsFromEnv sets every flag that the command line left out from its variable;
// all bad values are reported at once.
func flagsFromEnv(cmd *cobra.Command) error {
	var faults []error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		v, ok := os.LookupEnv(envName(f.Name))
		if !ok || f.Changed {
			return
		}
		if err := cmd.Flags().Set(f.Name, v); err != nil {
			faults = append(faults, fmt.Errorf("%s=%q: %w", envName(f.Name), v, err))
		}
	})
	return errors.Join(faults...)
}

// tolerant is a flag's value that notes what it cannot take, so that the parser goes on.
type tolerant struct {
	pflag.Value
	flag   string
	faults *[]error
}

// Set implements pflag.Value.
func (t tolerant) Set(v string) error {
	if err := t.Value.Set(v); err != nil {
		*t.faults = append(*t.faults, fmt.Errorf("--%s %q: %w", t.flag, v, err))
	}
	return nil
}

// flagFaults gives every fault of a command line of which the parser found only the
// first, and of the settings that come from elsewhere.
func flagFaults(args []string, first error) error {
	cmd, args, err := newRoot().Find(args)
	if err != nil {
		return first
	}
	cmd.InheritedFlags() // makes them the command's
	var faults []error
	values := map[*pflag.Flag]pflag.Value{}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		values[f] = f.Value
		f.Value = tolerant{f.Value, f.Name, &faults}
	})
	err = cmd.ParseFlags(args)
	for f, v := range values {
		f.Value = v
	}
	if err != nil { // an unknown flag: what follows it cannot be read
		return errors.Join(append(faults, err)...)
	}
	for c := cmd; c != nil; c = c.Parent() {
		if c.PersistentPreRunE != nil {
			return errors.Join(append(faults, c.PersistentPreRunE(cmd, nil))...)
		}
	}
	return errors.Join(faults...)
}

// doubleDashes lets every long flag be written with one dash, as HashiCorp's
// tools do: -json becomes --json where a flag of that name exists.
func doubleDashes(root *cobra.Command, args []string) []string {
	known := map[string]bool{"help": true}
	var collect func(*cobra.Command)
	collect = func(c *cobra.Command) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) { known[f.Name] = true })
		for _, sub := range c.Commands() {
			collect(sub)
		}
	}
	collect(root)
	out := make([]string, 0, len(args))
	for i, a := range args {
		if a == "--" {
			return append(out, args[i:]...)
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(a, "-"), "=")
		if strings.HasPrefix(a, "-") && !strings.HasPrefix(a, "--") && known[name] {
			a = "-" + a
		}
		out = append(out, a)
	}
	return out
}

// loopbackOnly refuses plain text at addresses that other machines can reach.
func loopbackOnly(addrs map[string]string) error {
	var faults []error
	for _, flag := range sortedKeys(addrs) {
		host, _, err := net.SplitHostPort(addrs[flag])
		if err != nil {
			faults = append(faults, fmt.Errorf("--%s %q: want HOST:PORT", flag, addrs[flag]))
			continue
		}
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			faults = append(faults, fmt.Errorf("--%s %q: plain text is for loopback addresses such as 127.0.0.1; for others configure TLS", flag, addrs[flag]))
		}
	}
	return errors.Join(faults...)
}

// portFree says in one sentence when an address is taken.
func portFree(flag, addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("address %s is taken or cannot be used (%w): end what uses it, or choose another with --%s or %s", addr, errors.Unwrap(err), flag, envName(flag))
	}
	return l.Close()
}

// newLogger writes JSON lines at the given level.
func newLogger(w io.Writer, level string) (*slog.Logger, error) {
	log, _, err := newLeveledLogger(w, level)
	return log, err
}

// newLeveledLogger also gives the level, to be changed while the program runs.
func newLeveledLogger(w io.Writer, level string) (*slog.Logger, *slog.LevelVar, error) {
	l := new(slog.LevelVar)
	if err := setLevel(l, level); err != nil {
		return nil, nil, fmt.Errorf("--log-level %w", err)
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: l})), l, nil
}

func setLevel(l *slog.LevelVar, level string) error {
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return fmt.Errorf("%q: use debug, info, warn or error", level)
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
