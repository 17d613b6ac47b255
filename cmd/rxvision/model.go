package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func newModel() *cobra.Command {
	cmd := &cobra.Command{Use: "model", Short: "Push, list and show models"}
	cmd.AddCommand(newModelPush(), newModelList(), newModelShow(), newModelAlias())
	return cmd
}

func newModelPush() *cobra.Command {
	var (
		c     clientFlags
		about api.About
	)
	cmd := &cobra.Command{
		Use:   "push NAME FILE.onnx",
		Short: "Register an ONNX file as the next version of a model",
		Long: `Sends the file, has a node load it in a limited process, and registers it as the next
version. A file that is no model that can be served is refused, with the reason, and
leaves nothing behind. The same bytes again give the version that holds them.

With --alloc or --job the version names the work that made it: the servers verify it,
and keep that job, its version, allocation and evaluation for as long as the version.`,
		Example: `  rxvision model push fashion models/fashion/fashion.onnx
  rxvision model push -alloc $NOMAD_ALLOC_ID fashion out.onnx      # in a task that trains`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			f, err := os.Open(args[1])
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			if !info.Mode().IsRegular() {
				return fmt.Errorf("%s is no file", args[1])
			}
			v, err := client.Push(cmd.Context(), args[0], about, f, info.Size(), newBar(cmd.ErrOrStderr(), "push "+args[0]).set)
			if err != nil {
				return fmt.Errorf("%s: %w", args[1], err)
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), v)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "model %s version %d: %s, %s\n", v.Model, v.Version, bytesText(v.Size), v.Digest)
			return err
		},
	}
	c.add(cmd)
	f := cmd.Flags()
	f.StringVar(&about.Description, "description", "", "what the model is for")
	f.StringVar(&about.AllocID, "alloc", "", "ID of the allocation that made the model")
	f.StringVar(&about.JobID, "job", "", "the job that made the model")
	f.StringVar(&about.Namespace, "namespace", "", "the job's namespace; default: default")
	return cmd
}

func newModelList() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List models", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			models, err := client.Models(cmd.Context())
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), models)
			}
			if len(models) == 0 {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "no models; push one with `rxvision model push NAME FILE.onnx`")
				return err
			}
			var rows [][]string
			for _, m := range models {
				rows = append(rows, []string{m.Name, strconv.FormatUint(m.LatestVersion, 10), aliasText(m.Aliases), timeText(m.CreateTime)})
			}
			return table(cmd.OutOrStdout(), "NAME|NEWEST|ALIASES|CREATED (UTC)", rows)
		},
	}
	c.add(cmd)
	return cmd
}

func aliasText(aliases map[string]uint64) string {
	var out []string
	for _, a := range sortedKeys(aliases) {
		out = append(out, fmt.Sprintf("%s=%d", a, aliases[a]))
	}
	if out == nil {
		return "-"
	}
	return strings.Join(out, ",")
}

func newModelShow() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use: "show NAME", Short: "Show a model, its versions and what the newest takes and gives", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			m, err := client.Model(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if c.json {
				return printJSON(out, m)
			}
			fmt.Fprintf(out, "name         %s\ndescription  %s\naliases      %s\n\n", m.Name, m.Description, aliasText(m.Aliases))
			var rows [][]string
			for _, v := range m.Versions {
				rows = append(rows, []string{strconv.FormatUint(v.Version, 10), bytesText(v.Size), timeText(v.CreateTime), originText(v.Origin), v.Digest})
			}
			if err := table(out, "VERSION|SIZE|CREATED (UTC)|MADE BY|DIGEST", rows); err != nil || len(m.Versions) == 0 {
				return err
			}
			newest := m.Versions[0]
			rows = nil
			for _, side := range []struct {
				name  string
				specs []cluster.TensorSpec
			}{{"input", newest.Inputs}, {"output", newest.Outputs}} {
				for _, t := range side.specs {
					rows = append(rows, []string{side.name, t.Name, t.Datatype, strings.ReplaceAll(fmt.Sprint(t.Shape), " ", ",")})
				}
			}
			fmt.Fprintln(out)
			return table(out, "OF THE NEWEST|NAME|TYPE|SHAPE", rows)
		},
	}
	c.add(cmd)
	return cmd
}

// originText names the work that made a model version.
func originText(o *cluster.ModelOrigin) string {
	switch {
	case o == nil:
		return "-"
	case o.AllocID == "":
		return fmt.Sprintf("%s version %d", o.JobID, o.JobVersion)
	}
	return fmt.Sprintf("%s version %d, %s", o.JobID, o.JobVersion, short(o.AllocID))
}

func newModelAlias() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use: "alias NAME ALIAS [VERSION]", Short: "Point an alias at a version; without VERSION remove it",
		Args: cobra.RangeArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			if len(args) == 2 {
				return client.DeleteAlias(cmd.Context(), args[0], args[1])
			}
			v, err := strconv.ParseUint(args[2], 10, 64)
			if err != nil || v == 0 {
				return fmt.Errorf("version %q: want a number from 1", args[2])
			}
			return client.SetAlias(cmd.Context(), args[0], args[1], v)
		},
	}
	c.add(cmd)
	return cmd
}
