package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/agext/levenshtein"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// Configuration has one vocabulary in three places: the flag --tls-cert is the
// variable RXVISION_TLS_CERT and, in a file, tls_cert or
//
//	tls { cert = "…" }
//
// The command line wins over the environment, that over files; of files the later
// one wins. Every fault of all of them is reported at once.

// Bounds of configuration files.
const (
	maxConfigFile  = 1 << 20 // bytes
	maxConfigFiles = 100
)

// Marks of flags: those that a running process takes over on SIGHUP, and those
// that a file has set.
const (
	reloadable = "rxvision_reloadable"
	fromFile   = "rxvision_from_file"
)

// addConfig gives a daemon's command the flag --config and marks which of its
// other flags can be reloaded. What check finds wrong with the settings is told
// together with what cannot be read of them.
func addConfig(cmd *cobra.Command, check func() error, reload ...string) {
	cmd.PersistentPreRunE = func(run *cobra.Command, _ []string) error {
		err := loadSettings(run)
		if run == cmd { // and no command below it
			err = errors.Join(err, check())
		}
		return err
	}
	// SIGHUP must not end a daemon that is still starting, before reload.run hears it.
	cmd.PreRun = func(*cobra.Command, []string) { signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) }
	cmd.Flags().StringSlice("config", nil, "HCL file, or folder of *.hcl files, with settings named as the flags; may be given several times")
	for _, name := range reload {
		if err := cmd.Flags().SetAnnotation(name, reloadable, []string{"true"}); err != nil {
			panic(err) // no such flag: a bug
		}
	}
}

// setting is one attribute of a configuration file.
type setting struct {
	flag  string
	value cty.Value
	at    hcl.Range
}

// loadSettings sets the flags that the command line has not set, and tells
// everything that cannot be read.
func loadSettings(cmd *cobra.Command) error {
	return errors.Join(flagsFromEnv(cmd), loadConfig(cmd))
}

// loadConfig sets the flags that neither the command line nor the environment
// has set from the files of --config.
func loadConfig(cmd *cobra.Command) error {
	flags := cmd.Flags()
	if flags.Lookup("config") == nil {
		return nil
	}
	paths, err := flags.GetStringSlice("config")
	if err != nil {
		return err
	}
	settings, err := readConfig(paths)
	faults := []error{err}
	for _, s := range slices.Backward(settings) { // of several the last counts
		f := flags.Lookup(s.flag)
		switch {
		case f == nil || s.flag == "config" || s.flag == "help":
			faults = append(faults, fmt.Errorf("%s: there is no setting %q%s", s.at, strings.ReplaceAll(s.flag, "-", "_"), nearest(flags, s.flag)))
		case f.Changed: // by what goes first
		default:
			if err := setFlag(flags, f, s.value); err != nil {
				faults = append(faults, fmt.Errorf("%s: %s: %w", s.at, strings.ReplaceAll(s.flag, "-", "_"), err))
			}
			_ = flags.SetAnnotation(f.Name, fromFile, []string{s.at.String()}) // the flag is there
		}
	}
	return errors.Join(faults...)
}

// readConfig reads files, and the *.hcl files of folders in the order of their names.
func readConfig(paths []string) (settings []setting, err error) {
	var faults []error
	var files []string
	for _, p := range paths {
		info, err := os.Stat(p)
		if err != nil {
			faults = append(faults, fmt.Errorf("--config: %w", err))
			continue
		}
		if !info.IsDir() {
			files = append(files, p)
			continue
		}
		inside, err := filepath.Glob(filepath.Join(p, "*.hcl"))
		if err == nil && len(inside) == 0 {
			err = fmt.Errorf("--config %s: the folder has no *.hcl file", p)
		}
		faults = append(faults, err)
		files = append(files, inside...) // Glob sorts
	}
	if len(files) > maxConfigFiles {
		return nil, fmt.Errorf("--config: %d files; at most %d are read", len(files), maxConfigFiles)
	}
	for _, name := range files {
		src, err := readConfigFile(name)
		if err != nil {
			faults = append(faults, fmt.Errorf("--config: %w", err))
			continue
		}
		file, diags := hclsyntax.ParseConfig(src, name, hcl.InitialPos)
		faults = append(faults, diagErrors(diags))
		if file == nil {
			continue
		}
		found, err := walkConfig("", file.Body.(*hclsyntax.Body), 0)
		faults = append(faults, err)
		settings = append(settings, found...)
	}
	return settings, errors.Join(faults...)
}

func readConfigFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("not a plain file")}
	}
	if info.Size() > maxConfigFile {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d that are read", name, info.Size(), maxConfigFile)
	}
	return os.ReadFile(name)
}

// walkConfig gives a body's attributes; the name of a block is the beginning of
// those of its settings.
func walkConfig(prefix string, body *hclsyntax.Body, depth int) (settings []setting, err error) {
	const deepest = 4
	var faults []error
	for name, attr := range body.Attributes {
		v, diags := attr.Expr.Value(nil)
		if diags.HasErrors() {
			faults = append(faults, diagErrors(diags))
			continue
		}
		settings = append(settings, setting{prefix + strings.ReplaceAll(name, "_", "-"), v, attr.NameRange})
	}
	slices.SortFunc(settings, func(a, b setting) int { return a.at.Start.Byte - b.at.Start.Byte })
	for _, b := range body.Blocks {
		switch {
		case len(b.Labels) > 0:
			faults = append(faults, fmt.Errorf("%s: block %q takes no label", b.TypeRange, b.Type))
		case depth == deepest:
			faults = append(faults, fmt.Errorf("%s: block %q is nested too deeply", b.TypeRange, b.Type))
		default:
			inside, err := walkConfig(prefix+strings.ReplaceAll(b.Type, "_", "-")+"-", b.Body, depth+1)
			settings, faults = append(settings, inside...), append(faults, err)
		}
	}
	return settings, errors.Join(faults...)
}

func diagErrors(diags hcl.Diagnostics) error {
	var faults []error
	for _, d := range diags {
		if d.Severity == hcl.DiagError {
			at := ""
			if d.Subject != nil {
				at = d.Subject.String() + ": "
			}
			faults = append(faults, fmt.Errorf("%s%s; %s", at, d.Summary, strings.TrimSuffix(d.Detail, ".")))
		}
	}
	return errors.Join(faults...)
}

// setFlag gives a flag the value of a file: a list to one that takes several.
func setFlag(flags *pflag.FlagSet, f *pflag.Flag, v cty.Value) error {
	if v.IsNull() || !v.IsWhollyKnown() {
		return errors.New("it has no value")
	}
	if several, ok := f.Value.(pflag.SliceValue); ok && (v.Type().IsTupleType() || v.Type().IsListType()) {
		var items []string
		for _, e := range v.AsValueSlice() {
			s, err := text(e)
			if err != nil {
				return err
			}
			items = append(items, s)
		}
		f.Changed = true
		return several.Replace(items)
	}
	s, err := text(v)
	if err != nil {
		return err
	}
	if err := flags.Set(f.Name, s); err != nil {
		return fmt.Errorf("%q does not fit: %w", s, errors.Unwrap(err))
	}
	return nil
}

func text(v cty.Value) (string, error) {
	s, err := convert.Convert(v, cty.String)
	if err != nil || s.IsNull() {
		return "", fmt.Errorf("a %s does not fit here", v.Type().FriendlyName())
	}
	return s.AsString(), nil
}

// nearest suggests a setting of a like name.
func nearest(flags *pflag.FlagSet, name string) string {
	best, least := "", 4 // letters that may differ
	flags.VisitAll(func(f *pflag.Flag) {
		if d := levenshtein.Distance(name, f.Name, nil); d < least {
			best, least = f.Name, d
		}
	})
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", strings.ReplaceAll(best, "-", "_"))
}

// reload is how a daemon takes its configuration over again on SIGHUP.
type reload struct {
	cmd   *cobra.Command
	fresh func() *cobra.Command // the same command with nothing set
	log   *slog.Logger
	// apply takes over a reloadable setting.
	apply func(name, value string) error
	// more is reloaded beside the settings: files that they name.
	more []func() error
}

// run reloads on each SIGHUP until ctx ends.
func (r *reload) run(ctx context.Context) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			if err := r.once(); err != nil {
				r.log.Error("the configuration was not reloaded whole", "error", err)
			} else {
				r.log.Info("configuration reloaded")
			}
		}
	}
}

// once reads the configuration again. If anything in it is wrong nothing changes;
// a changed setting that cannot be reloaded is logged as waiting for a restart.
func (r *reload) once() error {
	again := r.fresh()
	r.cmd.Flags().VisitAll(func(f *pflag.Flag) { // what the command line said, it says still
		if f.Changed && f.Annotations[fromFile] == nil {
			copyFlag(again.Flags().Lookup(f.Name), f)
		}
	})
	if err := loadConfig(again); err != nil {
		return err
	}
	var faults []error
	again.Flags().VisitAll(func(f *pflag.Flag) {
		now := r.cmd.Flags().Lookup(f.Name)
		switch {
		case now.Value.String() == f.Value.String():
		case f.Annotations[reloadable] == nil:
			r.log.Warn("a changed setting waits for a restart", "setting", f.Name)
		default:
			if err := r.apply(f.Name, f.Value.String()); err != nil {
				faults = append(faults, fmt.Errorf("--%s: %w", f.Name, err))
				return
			}
			copyFlag(now, f)
			r.log.Info("setting reloaded", "setting", f.Name)
		}
	})
	for _, f := range r.more {
		faults = append(faults, f())
	}
	return errors.Join(faults...)
}

// copyFlag gives to the value of from, of the same type.
func copyFlag(to, from *pflag.Flag) {
	var err error
	if several, ok := from.Value.(pflag.SliceValue); ok {
		err = to.Value.(pflag.SliceValue).Replace(several.GetSlice())
	} else {
		err = to.Value.Set(from.Value.String())
	}
	if err != nil {
		panic(err) // it was a value of such a flag
	}
	to.Changed = from.Changed
}
